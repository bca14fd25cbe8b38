"""A checkpoint's own greedy answers to many conversations: what a draft head learns from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

_AT_ONCE = 256


def greedy_answers(
    target: Path, conversations: Iterator[list[dict[str, Any]]], max_tokens: int
) -> Iterator[list[int] | None]:
    """Token ids in order, without the end token; None for an answer that did not end within `max_tokens`."""
    from kvkeye.cli.terminal import stage
    from kvkeye.engine import LLM, SamplingParams

    done = 0
    with LLM(str(target), max_num_seqs=32, media_workers=0) as llm:
        ends = set(llm.engine.processor.eos_token_ids)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        while chunk := list(islice(conversations, _AT_ONCE)):
            with stage(f"answers {done} to {done + len(chunk)}"):
                outputs = llm.chat(chunk, sampling)
            for output in outputs:
                answer = output.outputs[0]
                ids = [token for token in answer.token_ids if token not in ends]
                yield ids if ids and answer.finish_reason == "stop" else None
            done += len(chunk)
