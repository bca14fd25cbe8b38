"""From tokens of a row to what the caller sees: text, reasoning, log-probabilities, times.

Knows a decode function and a parser of tags, both passed in; must not know the scheduler.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Protocol

from kvkeye.engine.detokenize import Detokenizer, StopStrings
from kvkeye.engine.outputs import (
    STAGES,
    CompletionOutput,
    Logprob,
    OnStage,
    RequestMetrics,
    RequestOutput,
    SpeculationMetrics,
    Stage,
)
from kvkeye.engine.request import Request, SamplingParams, Sequence, State

Decode = Callable[[list[int]], str]
logger = logging.getLogger("kvkeye.engine")


class Parser(Protocol):
    """Splits text into reasoning and content as it comes; see kvkeye.models.keye.parsing."""

    def feed(self, text: str) -> tuple[str, str]: ...
    def finish(self) -> tuple[str, str]: ...


class Answer:
    """The visible side of one row. `stop_reason` is set when a stop string has come up."""

    def __init__(self, index: int, sampling: SamplingParams, decode: Decode, parser: Parser | None) -> None:
        self.index = index
        self.stop_reason: str | int | None = None
        self._decode = decode
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(sampling.stop)
        self._parser = parser
        self._token_ids: list[int] = []
        self._text = ""
        self._reasoning = ""
        self._logprobs: list[dict[int, Logprob]] | None = None if sampling.logprobs is None else []

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def push(self, token: int, logprobs: dict[int, Logprob] | None, is_hidden: bool) -> None:
        """Adds a token. A hidden one, the end of sentence, is counted but not shown."""
        self._token_ids.append(token)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append({i: replace(p, decoded_token=self._decode([i])) for i, p in logprobs.items()})
        if is_hidden:
            self.stop_reason = token
            return
        self._show(self._stops.push(self._detokenizer.push(token)))
        if self._stops.matched is not None:
            self.stop_reason = self._stops.matched

    def close(self) -> None:
        """Shows what was held back: the answer has ended."""
        self._show(self._stops.push(self._detokenizer.flush()))
        self._show(self._stops.flush())
        if self._stops.matched is not None:
            self.stop_reason = self._stops.matched
        if self._parser is not None:
            self._append(*self._parser.finish())

    def _show(self, text: str) -> None:
        if self._parser is None:
            self._append("", text)
        elif text:
            self._append(*self._parser.feed(text))

    def _append(self, reasoning: str, text: str) -> None:
        self._reasoning += reasoning
        self._text += text

    def output(self, finish_reason: str | None) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self._text,
            token_ids=list(self._token_ids),
            reasoning=self._reasoning,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self._logprobs is None else list(self._logprobs),
        )


@dataclass
class Times:
    """Seconds of a monotonic clock; None until it has happened."""

    arrival: float = field(default_factory=time.perf_counter)
    first_step: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Tracker:
    """All answers of a request with their times. `new_parser` makes a parser per answer; None for raw text."""

    def __init__(
        self,
        request: Request,
        decode: Decode,
        new_parser: Callable[[], Parser] | None,
        prepare_ms: float,
        on_stage: OnStage | None = None,
        speculation: Callable[[], SpeculationMetrics | None] = lambda: None,
    ) -> None:
        self.request = request
        self.times = Times()
        self.stage: Stage | None = None
        self.vision_ms = 0.0
        self.error: str | None = None
        self._decode = decode
        self._new_parser = new_parser
        self._prepare_ms = prepare_ms
        self._on_stage = on_stage
        self._speculation = speculation
        self._answers: dict[int, Answer] = {}
        self._num_prefilled = 0  # tokens that came with a prompt's pass or a fork of it

    def enter(self, stage: Stage) -> None:
        """Notes that a stage begins; stages only go forward."""
        if self.times.first_step is None:
            self.times.first_step = time.perf_counter()
        if self.stage is not None and STAGES.index(stage) <= STAGES.index(self.stage):
            return
        self.stage = stage
        if self._on_stage is not None:
            try:
                self._on_stage(stage)
            except Exception:
                logger.exception("request %s: its on_stage failed", self.request.request_id)

    def push(self, seq: Sequence, logprobs: list[dict[int, Logprob] | None]) -> bool:
        """Takes the row's new tokens, if any, with their log-probabilities; True if a stop string ends the row now.

        What follows a stop string within a step is taken back: without proposals it would never have been drawn.
        """
        answer = self._answers.get(seq.index)
        if answer is None:
            parser = self._new_parser() if self._new_parser else None
            answer = self._answers[seq.index] = Answer(seq.index, self.request.sampling, self._decode, parser)
        is_first = answer.num_tokens == 0
        fresh = seq.tokens[seq.num_prompt + answer.num_tokens :]
        if fresh:
            self.times.last_token = time.perf_counter()
            self.times.first_token = self.times.first_token or self.times.last_token
        for left, token, values in zip(range(len(fresh) - 1, -1, -1), fresh, chain(logprobs, repeat(None))):
            answer.push(token, values, is_hidden=left == 0 and seq.finish_reason == "stop")
            if left and isinstance(answer.stop_reason, str):
                del seq.tokens[-left:]
                break
        if is_first:
            self._num_prefilled += answer.num_tokens
        if seq.state is not State.FINISHED:
            return isinstance(answer.stop_reason, str)
        answer.close()
        if isinstance(answer.stop_reason, str):  # came up with the last token allowed, or before what ended the row
            seq.finish_reason = "stop"
        return False

    def close(self, seq: Sequence) -> None:
        """Shows what an answer held back, after it was ended from outside."""
        if seq.index in self._answers:
            self._answers[seq.index].close()

    def output(self) -> RequestOutput:
        outputs = []
        for seq in sorted(self.request.sequences, key=lambda seq: seq.index):
            answer = self._answers.get(seq.index)
            reason = seq.finish_reason
            empty = CompletionOutput(seq.index, finish_reason=reason)
            outputs.append(empty if answer is None else answer.output(reason))
        return RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt,
            outputs=outputs,
            metrics=self._metrics(),
            finished=self.request.is_finished,
            error=self.error,
        )

    def _metrics(self) -> RequestMetrics:
        times, sequences = self.times, self.request.sequences
        num_generated = sum(seq.num_generated for seq in sequences)
        decode_ms = _ms(times.first_token, times.last_token)
        num_decoded = num_generated - self._num_prefilled
        return RequestMetrics(
            num_prompt_tokens=len(self.request.prompt),
            num_generated_tokens=num_generated,
            num_cached_tokens=sequences[0].num_cached,
            num_preemptions=sum(seq.num_preemptions for seq in sequences),
            prepare_ms=self._prepare_ms,
            vision_ms=self.vision_ms,
            queue_ms=_ms(times.arrival, times.first_step),
            prefill_ms=_ms(times.first_step, times.first_token),
            decode_ms=decode_ms,
            ttft_ms=_ms(times.arrival, times.first_token),
            tokens_per_s=1e3 * num_decoded / decode_ms if decode_ms and num_decoded > 0 else None,
            speculation=self._speculation() if self.request.is_finished else None,
        )


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else 1e3 * (end - start)
