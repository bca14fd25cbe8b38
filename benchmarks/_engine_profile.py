"""Where a decode step of our engine goes: ops by torch's profiler, the rest by subtraction."""

from __future__ import annotations

import statistics

import torch
from _engine_checkpoint import Geometry
from _engine_sides import Kvkeye, Prompts
from torch.profiler import ProfilerActivity, profile

STEPS = 16


def print_profile(side: Kvkeye, prompts: Prompts, geometry: Geometry) -> None:
    """Milliseconds per step and op; the step itself is timed without the profiler, which slows Python down."""
    side.start(prompts, 4 * STEPS)
    side.advance(4)
    step = statistics.median(side.advance(1) for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.advance(STEPS)
    side.finish()
    rows = [(e.self_cpu_time_total / STEPS / 1e3, e.count / STEPS, e.key) for e in profiler.key_averages()]
    inside = sum(ms for ms, _, _ in rows)
    layers = geometry.text.num_hidden_layers
    print(f"one step of one answer: {step * 1e3:.2f} ms (median of {STEPS})")
    for ms, calls, name in sorted(rows, reverse=True)[:16]:
        print(f"  {name:<44}{ms:>9.3f} ms{ms / step / 10:>7.1f} %{calls:>8.1f} calls")
    python = step * 1e3 - inside
    print(f"  {'inside ops':<44}{inside:>9.3f} ms")
    print(
        f"  {'Python and dispatch':<44}{python:>9.3f} ms, {python / layers * 1e3:.0f} us per layer if all were theirs"
    )
    print(f"  threads: {torch.get_num_threads()}")
