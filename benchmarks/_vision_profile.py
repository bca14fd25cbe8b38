"""Where a picture's way through the tower goes: ops by torch's profiler, each beside the limit it is bound by."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from _limits import Limits
from torch.profiler import ProfilerActivity, profile

Shapes = list[list[int]]


def flops_of(name: str, shapes: Shapes) -> float:
    """Of one call; 0 for what only moves data."""
    if name.startswith("kvkeye_cpu::prepacked_linear"):
        (n, features), (outputs,) = shapes[0], shapes[2]  # x, bias
        return 2.0 * n * features * outputs
    if name == "kvkeye_cpu::varlen_attention":
        n, heads, head_dim = shapes[0]  # one segment
        return 4.0 * n * n * heads * head_dim
    return 0.0


def print_profile(name: str, run: Callable[[], Any], limits: Limits) -> None:
    """One run with the profiler, then one without: seconds by op and shape, the products' limit last."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    start = time.perf_counter()
    run()
    whole = time.perf_counter() - start
    events = profiler.key_averages(group_by_input_shape=True)
    rows = sorted(((e.self_cpu_time_total / 1e6, e) for e in events), key=lambda row: -row[0])
    print(f"{name}: {whole:.2f} s; under the profiler {sum(seconds for seconds, _ in rows):.2f} s")
    least = 0.0
    for seconds, event in rows:
        flops = event.count * flops_of(event.key, event.input_shapes)
        least += flops / limits.bf16
        if seconds < 0.002 * whole:
            continue
        rate = (
            f"{flops / seconds / 1e9:>6.0f} GFLOP/s, {flops / seconds / limits.bf16:>4.0%} of the limit"
            if flops
            else ""
        )
        shapes = " ".join("x".join(map(str, shape)) for shape in event.input_shapes[:2] if shape)
        print(f"  {event.key:<36}{shapes:<28}{event.count:>4} calls{seconds:>8.2f} s{seconds / whole:>6.1%} {rate}")
    print(f"  {'the products at the limit':<68}{'':>5}{least:>8.2f} s{least / whole:>6.1%}")
