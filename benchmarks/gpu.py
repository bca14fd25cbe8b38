"""The one command for a machine with a GPU: every kernel checked there, then timed beside its peers.

    python benchmarks/gpu.py                          all steps, until 460 seconds are over
    python benchmarks/gpu.py --steps conformance bits
    python benchmarks/gpu.py --rehearse --seconds 60  the checks on the CPU's kernels, where there is no GPU
    python benchmarks/gpu.py --needs                  what needs a GPU, and why

Steps, in order: conformance (every row of the case table for `cuda` and `triton`, against float64), graphs (a replayed
graph gives the bits of the plain call), bits (a row's attention does not depend on its batch), engine (tiny-keye beside
the CPU, recorded passes, bits, waits), decode (steps of Qwen3-8B's geometry, one of them with a draft head), encode
(passes of the 8B tower), attention (beside SDPA, FlexAttention, varlen_attn and FlashInfer), timing, sanitizer
(compute-sanitizer on the `cuda` rows in bf16, where it is installed).
Each row is one line of JSON, written when it is done: started again, the command goes on where it stopped, and repeats
what failed.
Exit code: 0 all passed, 1 a row failed, 3 no GPU, 4 time ran out (start it again).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_attention import attention_row, attention_rows
from _gpu_checks import DTYPES, bits, conformance, graphs, outputs_of
from _gpu_decode import STEPS as STEPS_OF_8B
from _gpu_decode import TINY_STEPS, Times, decode_row, wall_times
from _gpu_encode import PACKS, TINY_PACKS, encode_row
from _gpu_engine import engine_checks
from _gpu_needs import needs
from _gpu_sanitizer import sanitized
from _measure import machine

from kvkeye import ops
from kvkeye.testing.case import Case, Sample, good
from kvkeye.testing.compare import copied

STEPS = ("conformance", "graphs", "bits", "engine", "decode", "encode", "attention", "timing", "sanitizer")
IMPLEMENTATIONS = ("cuda", "triton")
FAILED, NO_GPU, OUT_OF_TIME = 1, 3, 4
FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


class Record:
    """Rows done on this device, kept in a file."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows = {row["key"]: row for row in rows if row["device"] == device}

    def done(self, key: str) -> bool:
        return key in self.rows and not self.rows[key]["status"].startswith("fail")

    def add(self, key: str, status: str, **figures: Any) -> None:
        self.rows[key] = {"key": key, "device": self.device, "status": status, **figures}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


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


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.ones(256 << 20, device="cuda")
    target = torch.empty_like(source)
    (milliseconds,) = event_times([lambda: target.copy_(source)], 10)
    return 2 * source.numel() * 4 / milliseconds * 1e3


def timed(op: ops.Op, case: Case, implementation: str, bandwidth: float) -> dict[str, Any]:
    name, make = PEERS.get(op.name, ("eager reference", None))
    arguments = copied(case.args)
    peer = make(*case.args) if make else (lambda: outputs_of(op, arguments, "eager"))
    own, other = event_times([lambda: outputs_of(op, arguments, implementation), peer], 20)
    return {
        "ms": own, "peer": name, "peer_ms": other, "ratio": other / own, "tflop_per_s": case.cost.flops / own / 1e9,
        "gb_per_s": case.cost.bytes / own / 1e6, "share_of_copy": case.cost.bytes / own * 1e3 / bandwidth,
    }  # fmt: skip


def timing(record: Record, deadline: float) -> bool:
    """False where time ran out. A row that did not pass its check is not timed."""
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    for op in ops.OPS.values():
        for implementation in (i for i in IMPLEMENTATIONS if i in op.implementations):
            prefix = f"conformance/{op.name}/{implementation}/"
            failed = any(k.startswith(prefix) and r["status"].startswith("fail") for k, r in record.rows.items())
            for case in [] if failed else good(op.name, Sample(DTYPES["bf16"], "cuda", big=True)):
                key = f"timing/{op.name}/{implementation}/{case.id}"
                if not case.bench or record.done(key) or any(op.implementations[implementation].reasons([], case.args)):
                    continue
                if time.monotonic() > deadline:
                    return False
                figures = timed(op, case, implementation, bandwidth)
                record.add(key, "pass", **figures)
                own, share = f"{figures['ms']:9.4f} ms", f"{figures['share_of_copy']:.0%} of copy"
                print(f"{key:<64}{own}, {figures['ratio']:.2f} x {figures['peer']}, {share}")
    return True


Measured = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def decoding(is_rehearsal: bool) -> Measured:
    """Steps of Qwen3-8B's geometry; rehearsed on a tiny one."""
    device, times, bandwidth = _ways(is_rehearsal)
    for step in TINY_STEPS if is_rehearsal else STEPS_OF_8B:
        yield f"decode/{step.key}", partial(decode_row, step, device, times, bandwidth)


def encoding(is_rehearsal: bool) -> Measured:
    """Encoder passes of the 8B checkpoints' tower; rehearsed on a tiny one."""
    device, times, _ = _ways(is_rehearsal)
    for pictures, side in TINY_PACKS if is_rehearsal else PACKS:
        key = f"encode/{'tiny' if is_rehearsal else 'siglip'}/{pictures}x{side * side}"
        yield key, partial(encode_row, pictures, side, device, times, is_rehearsal)


def attending(is_rehearsal: bool) -> Measured:
    """Attention beside its peers; rehearsed on tiny shapes."""
    device, times, bandwidth = _ways(is_rehearsal)
    names = ("cpp",) if is_rehearsal else IMPLEMENTATIONS
    for key, shape, implementation in attention_rows(names, is_rehearsal):
        yield key, partial(attention_row, shape, implementation, device, times, bandwidth)


def _ways(is_rehearsal: bool) -> tuple[torch.device, Times, float | None]:
    """Where, by which clock, beside which bandwidth."""
    if is_rehearsal:
        return torch.device("cpu"), wall_times, None
    return torch.device("cuda"), event_times, copy_bandwidth()


def told(figures: dict[str, Any]) -> str:
    """A line of a row that was timed."""
    notes = [f"{figures['ms']:.3f} ms"]
    if rate := figures.get("tflop_per_s"):
        notes.append(f"{rate:.0f} TFLOP/s")
    if share := figures.get("share_of_copy"):
        notes.append(f"{share:.0%} of copy")
    beside = figures["sides_ms"] if "sides_ms" in figures else figures["peers_ms"]
    return ", ".join(notes) + "; " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in beside.items())


def measured(rows: Measured, record: Record, deadline: float) -> bool:
    """Checks and times what is not done yet; False where time ran out."""
    for key, measure in rows:
        if record.done(key):
            continue
        if time.monotonic() > deadline:
            return False
        try:
            figures = measure()
        except Exception as error:
            record.add(key, f"fail: {type(error).__name__}: {error}")
            print(f"{key}: {error}")
            continue
        record.add(key, "pass", **figures)
        print(f"{key}: {told(figures)}")
    return True


def checked(rows: Iterator[tuple[str, Callable[[], str]]], record: Record, deadline: float, only: str = "") -> bool:
    """Runs what is not done yet; False where time ran out."""
    for key, check in rows:
        if record.done(key) or only not in key:
            continue
        if time.monotonic() > deadline:
            return False
        try:
            status = check()
        except Exception as error:  # a row's trouble is its result; the others still run
            status = f"fail: {type(error).__name__}: {error}"
            print(f"{key}: {status}")
        record.add(key, status)
    return True


def summary(record: Record) -> int:
    """Prints the counts; returns how many rows failed."""
    counts: dict[str, dict[str, int]] = {}
    for key, row in record.rows.items():
        step, verdict = key.partition("/")[0], row["status"].partition(":")[0]
        by = counts.setdefault(step, {})
        by[verdict] = by.get(verdict, 0) + 1
    for step, by in counts.items():
        print(f"{step:<14}" + ", ".join(f"{count} {verdict}" for verdict, count in sorted(by.items())))
    return sum(by.get("fail", 0) for by in counts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--seconds", type=float, default=460.0, help="stop after so long; started again, it goes on")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="the checks on the CPU, with its C++ kernels")
    parser.add_argument("--only", default="", help="checks whose key has this in it")
    parser.add_argument("--needs", action="store_true", help="print what needs a GPU, and why")
    options = parser.parse_args()
    if options.needs:
        print(needs(IMPLEMENTATIONS))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print(
            f"benchmarks/gpu.py: no GPU is visible to torch {torch.__version__}, so nothing was run. It needs a CUDA "
            "build of torch and a device; --rehearse runs the checks on the CPU, --needs says what it cannot show.",
            file=sys.stderr,
        )
        return NO_GPU
    device, names = ("cpu", ("cpp",)) if options.rehearse else ("cuda", IMPLEMENTATIONS)
    about = "CPU rehearsal" if options.rehearse else torch.cuda.get_device_name()
    record, deadline = Record(options.json, about), time.monotonic() + options.seconds
    print(f"{about}; {machine()}")
    steps: dict[str, Callable[[], bool]] = {
        "conformance": lambda: checked(conformance(names, device), record, deadline, options.only),
        "bits": lambda: checked(bits(names, device), record, deadline),
        "engine": lambda: checked(engine_checks(device), record, deadline),
        "decode": lambda: measured(decoding(options.rehearse), record, deadline),
        "encode": lambda: measured(encoding(options.rehearse), record, deadline),
        "attention": lambda: measured(attending(options.rehearse), record, deadline),
    }
    if not options.rehearse:
        steps["graphs"] = lambda: checked(graphs(names, device), record, deadline)
        steps["sanitizer"] = lambda: checked(sanitized(), record, deadline)
        steps["timing"] = lambda: timing(record, deadline)
    in_time = all(steps[step]() for step in STEPS if step in options.steps and step in steps)
    failed = summary(record)
    return FAILED if failed else 0 if in_time else OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
