"""Times of single ops on a GPU, beside a named peer; rehearsed on the CPU's kernels with the first case of each op."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_checks import DTYPES, outputs_of

from kvkeye import ops
from kvkeye.testing.case import Case, Sample, good
from kvkeye.testing.compare import copied

Times = Callable[[list[Callable[[], Any]], int], list[float]]
FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


def event_times(sides: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each side by events, the sides taking turns, the cache emptied before each call."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for side in sides:
        side(), side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, record in zip(sides, times, strict=True):
            flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            side()
            end.record()
            end.synchronize()
            record.append(start.elapsed_time(end))
    return [statistics.median(record) for record in times]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.ones(256 << 20, device="cuda")
    target = torch.empty_like(source)
    (milliseconds,) = event_times([lambda: target.copy_(source)], 10)
    return 2 * source.numel() * 4 / milliseconds * 1e3


def gathered_sdpa(q: Any, k: Any, v: Any, table: Any, bounds: Any, context: Any, tree: Any, scale: float) -> Any:
    """torch's attention of the first sequence over keys that were gathered before the clock started."""
    blocks, length = table[0].long(), int(context[0])
    keys, values = (c[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length].contiguous() for c in (k, v))
    rows = q.transpose(0, 1)[None].contiguous()
    return lambda: F.scaled_dot_product_attention(rows, keys, values, scale=scale, enable_gqa=True)


#: Makes the peer's call from the arguments; ops without an entry are compared with their eager reference.
PEERS: dict[str, tuple[str, Callable[..., Callable[[], Any]]]] = {
    "paged_attention": ("torch SDPA, keys gathered before", gathered_sdpa),
    "rms_norm": ("torch.rms_norm", lambda x, w, eps: lambda: F.rms_norm(x, w.shape, w, eps)),
    "layer_norm": ("torch.layer_norm", lambda x, w, b, eps: lambda: F.layer_norm(x, w.shape, w, b, eps)),
    "packed_linear": ("torch.linear", lambda *arguments: lambda: F.linear(*arguments)),
}


def timed(op: ops.Op, case: Case, implementation: str, times: Times, bandwidth: float | None) -> dict[str, Any]:
    name, make = PEERS.get(op.name, ("eager reference", None))
    arguments = copied(case.args)
    peer = make(*case.args) if make else (lambda: outputs_of(op, arguments, "eager"))
    own, other = times([lambda: outputs_of(op, arguments, implementation), peer], 20)
    return {
        "ms": own, "peers_ms": {name: other}, "ratio": other / own, "tflop_per_s": case.cost.flops / own / 1e9,
        "gb_per_s": case.cost.bytes / own / 1e6,
        "share_of_copy": case.cost.bytes / own * 1e3 / bandwidth if bandwidth else None,
    }  # fmt: skip


def timed_rows(
    implementations: tuple[str, ...], device: torch.device, times: Times, bandwidth: float | None,
    has_failed: Callable[[str], bool],
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:  # fmt: skip
    """(key, measurement) of every case worth timing. An op of which a check `has_failed`, by prefix, is not timed."""
    big = device.type == "cuda"
    for op in ops.OPS.values():
        for implementation in (name for name in implementations if name in op.implementations):
            if has_failed(f"conformance/{op.name}/{implementation}/"):
                continue
            reasons = op.implementations[implementation].reasons
            cases = good(op.name, Sample(DTYPES["bf16"], device.type, big=big))
            for case in [case for case in cases if case.bench] if big else cases[:1]:
                if not any(reasons([], case.args)):
                    key = f"timing/{op.name}/{implementation}/{case.id}"
                    yield key, partial(timed, op, case, implementation, times, bandwidth)
