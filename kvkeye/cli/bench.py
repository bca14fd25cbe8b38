"""Measures this installation. `latency`: answers of a fixed length, computed together, without a server.

Plain decoding and speculative decoding take turns in one process, after one round that is not counted; medians. Prompts
are computed anew in every round. Figures count only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeye.cli import exits, options
from kvkeye.cli.bundled import model_files, resolve_model
from kvkeye.cli.session import speculation_text
from kvkeye.cli.terminal import stage

if TYPE_CHECKING:
    from kvkeye.engine import Engine, RequestOutput, SamplingParams
    from kvkeye.engine.prepare import Prepared

QUESTION = "Describe the picture as JSON."
SIDES = ("plain", "speculative")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "kvkeye bench latency [MODEL] [--image FILE]... [--video FILE]... [options]"
    parser.add_argument("what", choices=["latency"], metavar="latency", help="what is measured")
    parser.add_argument("model", nargs="?", metavar="MODEL", help=options.MODEL_HELP)
    options.add_media(parser)
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help=f"the prompt's text ({QUESTION!r})")
    for name, default, text in (
        ("--output-tokens", 128, "tokens of every answer"),
        ("--batch", 1, "answers computed together"),
        ("--rounds", 5, "rounds that count"),
    ):
        parser.add_argument(name, type=options.at_least_one, default=default, metavar="N", help=f"{text} ({default})")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="only these")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_engine(parser)


def run(arguments: argparse.Namespace) -> int:
    model = resolve_model(arguments.model)
    content = [options.media_item(kind, path, arguments.fps) for kind, path in arguments.media or ()]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": arguments.question}]}]
    with stage(f"loading {model.name}"), model_files():
        engines, prompt = _load(arguments, model, messages)
    try:
        rounds = [_round(engines, prompt, arguments, i) for i in range(1 + arguments.rounds)][1:]
    finally:
        next(iter(engines.values())).close()
    result = _about(arguments, model, prompt) | {
        side: _summary([outputs[side] for outputs in rounds]) for side in arguments.sides
    }
    print(json.dumps(result) if arguments.json else _table(result, arguments.sides))
    return exits.OK


def _load(
    arguments: argparse.Namespace, model: Path, messages: list[dict[str, Any]]
) -> tuple[dict[str, Engine], Prepared]:
    """An engine per side over one set of weights, and the prompt."""
    from kvkeye.engine.engine import Engine
    from kvkeye.engine.loading import load_drafter

    config = replace(options.engine_config(arguments, model), max_num_seqs=arguments.batch, enable_prefix_cache=False)
    engines: dict[str, Engine] = {}
    for side in arguments.sides:
        own = replace(config, speculation=None) if side == "plain" else config
        first = next(iter(engines.values()), None)
        if first is None:
            engines[side] = Engine.from_config(own)
        else:
            weights = first.runner.model
            engines[side] = Engine(own, weights, first.processor, drafter=load_drafter(own, weights))
    return engines, next(iter(engines.values())).prepare(messages)


def _round(
    engines: dict[str, Engine], prompt: Prepared, arguments: argparse.Namespace, number: int
) -> dict[str, list[RequestOutput]]:
    """The answers of every side, one side after the other; equal ones, or a CommandError."""
    from kvkeye.engine.request import SamplingParams

    sampling = SamplingParams(
        temperature=arguments.temperature, max_tokens=arguments.output_tokens, ignore_eos=True, seed=0
    )
    salts = [f"{number} {i}" for i in range(arguments.batch)]
    outputs = {side: _answers(engine, prompt, sampling, salts) for side, engine in engines.items()}
    if len({str([output.outputs[0].token_ids for output in side]) for side in outputs.values()}) > 1:
        raise exits.CommandError("bench: the sides gave different answers.", exits.INTERNAL)
    return outputs


def _answers(engine: Engine, prompt: Prepared, sampling: SamplingParams, salts: list[str]) -> list[RequestOutput]:
    """Every answer under a salt of its own, so that it finds nothing of the others, of earlier rounds neither."""
    for salt in salts:
        engine.add(salt, prompt, sampling, salt=salt)
    found: dict[str, RequestOutput] = {}
    while engine.has_work:
        found.update({output.request_id: output for output in engine.step()})
    for output in found.values():
        if output.error is not None:
            raise exits.CommandError(f"the engine could not finish an answer: {output.error}", exits.INTERNAL)
    return [found[salt] for salt in salts]


def _about(arguments: argparse.Namespace, model: Path, prompt: Prepared) -> dict[str, Any]:
    import torch

    import kvkeye

    return {
        "benchmark": arguments.what, "model": str(model), "version": kvkeye.__version__, "torch": torch.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "batch": arguments.batch,
        "prompt_tokens": len(prompt.token_ids), "output_tokens": arguments.output_tokens, "rounds": arguments.rounds,
        "temperature": arguments.temperature,
    }  # fmt: skip


def _summary(rounds: list[list[RequestOutput]]) -> dict[str, Any]:
    """Medians over answers and rounds; speculation of the last round's first answer."""
    metrics = [output.metrics for outputs in rounds for output in outputs]
    found: dict[str, Any] = {
        name: statistics.median([getattr(m, name) or 0.0 for m in metrics])
        for name in ("ttft_ms", "prefill_ms", "vision_ms", "decode_ms")
    }
    per_token = sorted(0.0 if m.tokens_per_s is None else 1e3 / m.tokens_per_s for m in metrics)
    found["ms_per_token"] = statistics.median(per_token)
    found["ms_per_token_slowest"] = per_token[-1]
    speculation = metrics[-1].speculation
    found["speculation"] = None if speculation is None else asdict(speculation)
    return found


def _table(result: dict[str, Any], sides: list[str]) -> str:
    lines = [
        f"{result['batch']} x ({result['prompt_tokens']} + {result['output_tokens']} tokens), "
        f"{result['rounds']} rounds, {result['threads']} threads"
    ]
    for side in sides:
        m = result[side]
        lines.append(
            f"{side:<12} first token {m['ttft_ms']:.1f} ms, then {m['ms_per_token']:.2f} ms per token "
            f"(slowest answer {m['ms_per_token_slowest']:.2f})"
        )
        if m["speculation"] is not None:
            lines.append(f"{'':<12} {speculation_text(m['speculation'])}")
    if len(sides) == 2:
        ratio = result["plain"]["ms_per_token"] / max(result["speculative"]["ms_per_token"], 1e-9)
        lines.append(f"plain over speculative: {ratio:.2f}")
    return "\n".join(lines)
