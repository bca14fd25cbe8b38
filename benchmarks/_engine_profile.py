"""Where a decode step of our engine goes: ops by torch's profiler, beside what the machine needs for their bytes and
operations; the rest by subtraction.

Three steps: of one answer, of several answers, and one that checks proposals for one answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from _engine_checkpoint import Geometry
from _engine_sides import Kvkeye, Prompts
from _limits import Limits
from torch.profiler import ProfilerActivity, profile

from kvkeye.engine.draft import Draft
from kvkeye.engine.engine import Engine

STEPS = 16
NUM_PROPOSALS = 7
SHOWN = 14  # lines a step


class Wrong:
    """Proposes a chain of one token over and over; a drafter that costs nothing and is right by accident only."""

    def propose(self, sequences: Sequence[Any], num_tokens: Any) -> dict[int, Draft]:
        chain = Draft([1] * NUM_PROPOSALS, list(range(NUM_PROPOSALS)), [1.0] * NUM_PROPOSALS)
        return {seq.seq_id: chain.trimmed(num_tokens[seq.seq_id], NUM_PROPOSALS) for seq in sequences}

    def forget(self, sequence: Any) -> None:
        pass


def print_profile(side: Kvkeye, prompts: Prompts, geometry: Geometry, limits: Limits) -> None:
    """One table per kind of step. `prompts` are those of the step of several answers."""
    plain = side.engine
    settings = {"num_speculative_tokens": NUM_PROPOSALS, "adaptive": False}
    config = replace(plain.config, speculation=settings, max_num_seqs=1)
    checking = Engine(config, plain.runner.model, plain.processor, drafter=Wrong())
    _print_step("one answer", side, prompts[:1], geometry, limits)
    _print_step(f"{len(prompts)} answers", side, prompts, geometry, limits)
    side.engine = checking
    _print_step(f"one answer, {NUM_PROPOSALS} proposals checked", side, prompts[:1], geometry, limits)
    side.engine = plain


def _print_step(title: str, side: Kvkeye, prompts: Prompts, geometry: Geometry, limits: Limits) -> None:
    """The step itself is timed without the profiler, which slows Python and dispatch down but not the kernels.

    With it the decoder layers run op by op: the same kernels, in the same order.
    """
    side.start(prompts, 4 * STEPS)
    side.advance(4)
    step = statistics.median(side.advance(1) for _ in range(STEPS)) * 1e3
    layers = side.engine.runner.model.language.layers
    for layer in layers:  # one op each, which would hide what it is made of
        layer.in_parts = True
    side.advance(1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        side.advance(STEPS)
    for layer in layers:
        layer.in_parts = False
    side.finish()
    print(f"{title}: {step:.2f} ms a step (median of {STEPS})")
    kernels, shown = 0.0, []
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith("kvkeye_cpu::"):
            continue
        ms, calls = event.self_cpu_time_total / STEPS / 1e3, event.count / STEPS
        kernels += ms
        size, flops = _cost(event.key, event.input_shapes, geometry, len(prompts), len(prompts[0]))
        seconds = ms / 1e3 / calls
        line = f"  {event.key[12:]:<28}{event.input_shapes[:2]!s:<46}{calls:>6.1f} x{ms / calls * 1e3:>8.1f} us"
        line += f"{ms:>8.2f} ms{ms / step:>7.1%}"
        if size:
            least = max(size / limits.read, flops / limits.bf16)
            line += f"{size / seconds / 1e9:>7.1f} GB/s{flops / seconds / 1e9:>6.0f} GFLOP/s"
            line += f"{least / seconds:>6.0%} of limit"
        shown.append((ms, line))
    for _, line in sorted(shown, reverse=True)[:SHOWN]:
        print(line)
    rest = step - kernels
    print(f"  {'kernels':<101}{kernels:>8.2f} ms{kernels / step:>7.1%}")
    name = f"dispatch, allocation and Python, {rest / len(layers) * 1e3:.0f} us per layer"
    print(f"  {name:<101}{rest:>8.2f} ms{rest / step:>7.1%}")


def _cost(name: str, shapes: list[list[int]], geometry: Geometry, batch: int, context: int) -> tuple[float, float]:
    """Bytes that one call reads from memory, and its operations, of int8 half as many: they go twice as fast as bf16.

    0 where neither bounds it.
    """
    if "linear" in name:
        rows, packed = prod(shapes[0][:-1]), shapes[1]  # [blocks, parts, words, 32, values of a word]
        return 4.0 * prod(packed[:4]), 2.0 * rows * prod(packed[:4]) * min(packed[4], 2)
    if "paged_attention" in name:
        tokens, heads, dim = shapes[0]
        return geometry.kv_bytes(batch, context) / geometry.text.num_hidden_layers, 4.0 * tokens * heads * dim * context
    return 0.0, 0.0
