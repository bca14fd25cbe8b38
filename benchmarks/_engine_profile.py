"""Where a decode step of our engine goes: ops by torch's profiler, the rest by subtraction."""

from __future__ import annotations

import statistics

from _engine_checkpoint import Geometry
from _engine_sides import Kvkeye, Prompts
from torch.profiler import ProfilerActivity, profile

STEPS = 16


def print_profile(side: Kvkeye, prompts: Prompts, geometry: Geometry) -> None:
    """Milliseconds per step and op.

    The step itself is timed without the profiler, which slows Python and dispatch down but not the kernels.
    """
    side.start(prompts, 4 * STEPS)
    side.advance(4)
    step = statistics.median(side.advance(1) for _ in range(STEPS))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        side.advance(STEPS)
    side.finish()
    rows = [(e.self_cpu_time_total / STEPS / 1e3, e.count / STEPS, e.key) for e in profiler.key_averages()]
    kernels = sum(ms for ms, _, name in rows if name.startswith("kvkeye_cpu::"))
    layers = geometry.text.num_hidden_layers
    print(f"one step of one answer: {step * 1e3:.2f} ms (median of {STEPS})")
    for ms, calls, name in sorted(rows, reverse=True)[:16]:
        print(f"  {name:<44}{ms:>9.3f} ms{ms / step / 10:>7.1f} %{calls:>8.1f} calls")
    rest = step * 1e3 - kernels
    print(f"  {'kernels (kvkeye_cpu::)':<44}{kernels:>9.3f} ms{kernels / step / 10:>7.1f} %")
    print(f"  {'dispatch, allocation and Python':<44}{rest:>9.3f} ms, {rest / layers * 1e3:.0f} us per layer")
