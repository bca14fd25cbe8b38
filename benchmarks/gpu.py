"""The one command for a machine with a GPU: every kernel checked there, then timed beside its peers.

    python benchmarks/gpu.py                          all steps, until 460 seconds are over
    python benchmarks/gpu.py --steps conformance bits
    python benchmarks/gpu.py --rehearse --seconds 60  the same on the CPU's kernels and tiny shapes
    python benchmarks/gpu.py --needs                  what needs a GPU, and why
    python benchmarks/gpu.py --table FILE...          the table of rows that were timed, as Markdown

Steps, in order: compile (Triton's kernels for the next step, side by side), conformance (every row of the case table
for `cuda` and `triton`, gradients too, against float64), graphs (a replayed graph gives the bits of the plain call),
bits (a row's attention does not depend on its batch), engine (tiny-keye beside the CPU, recorded passes, bits, waits),
decode (steps of Qwen3-8B's geometry, one of them with a draft head), prompt (of that geometry), encode (passes of the
8B tower), attention (beside SDPA, FlexAttention, varlen_attn, FlashInfer and the reference), video (attention in
overlapping tiles), timing (single ops), sanitizer (compute-sanitizer on the `cuda` rows in bf16, where there is one).
Each row is one line of JSON, written when it is done: started again, the command goes on where it stopped, and repeats
what failed and, unless --keep is given, what other code than this has shown. Rows run in a child process: one that
breaks the device or never ends has failed, and another child does the rest.
Exit code: 0 all passed, 1 a row failed, 3 no GPU, 4 time ran out (start it again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _gpu_attention import attention_row, attention_rows
from _gpu_checks import bits, conformance, graphs
from _gpu_compile import compiling
from _gpu_decode import STEPS as STEPS_OF_8B
from _gpu_decode import TINY_STEPS, decode_row, wall_times
from _gpu_encode import PACKS, TINY_PACKS, encode_row
from _gpu_engine import engine_checks
from _gpu_needs import needs
from _gpu_prompt import PROMPT, TINY_PROMPT, prompt_row
from _gpu_record import Record
from _gpu_sanitizer import sanitized
from _gpu_supervisor import LOST, supervise
from _gpu_table import table
from _gpu_timing import Times, copy_bandwidth, event_times, timed_rows
from _gpu_video import tiles_row
from _measure import machine

from kvkeye import ops

STEPS = (
    "compile", "conformance", "graphs", "bits", "engine", "decode", "prompt", "encode", "attention", "video", "timing",
    "sanitizer",
)  # fmt: skip
IMPLEMENTATIONS = ("cuda", "triton")
FAILED, NO_GPU, OUT_OF_TIME = 1, 3, 4
ROW_SECONDS = 150.0  # a row that takes longer hangs

Rows = Iterator[tuple[str, Callable[[], Any]]]


def decoding(device: torch.device, times: Times, bandwidth: float | None) -> Rows:
    """Steps of Qwen3-8B's geometry; rehearsed on a tiny one."""
    for step in TINY_STEPS if device.type == "cpu" else STEPS_OF_8B:
        yield f"decode/{step.key}", partial(decode_row, step, device, times, bandwidth)


def prompts(device: torch.device, times: Times) -> Rows:
    step = TINY_PROMPT if device.type == "cpu" else PROMPT
    yield f"prompt/{step.geometry}/{step.context}", partial(prompt_row, step, device, times)


def encoding(device: torch.device, times: Times) -> Rows:
    """Encoder passes of the 8B checkpoints' tower; rehearsed on a tiny one."""
    is_tiny = device.type == "cpu"
    for pictures, side in TINY_PACKS if is_tiny else PACKS:
        key = f"encode/{'tiny' if is_tiny else 'siglip'}/{pictures}x{side * side}"
        yield key, partial(encode_row, pictures, side, device, times, is_tiny)


def attending(names: tuple[str, ...], device: torch.device, times: Times, bandwidth: float | None) -> Rows:
    """Attention beside its peers; rehearsed on tiny shapes."""
    for key, shape, implementation in attention_rows(names, device.type == "cpu"):
        yield key, partial(attention_row, shape, implementation, device, times, bandwidth)


def tiling(names: tuple[str, ...], device: torch.device, times: Times) -> Rows:
    for name in (name for name in names if name in ops.OPS["tile_attention"].implementations):
        yield f"video/tile_attention/{name}", partial(tiles_row, name, device, times, device.type == "cpu")


def told(figures: dict[str, Any]) -> str:
    """A line of a row that was timed."""
    notes = [f"{figures['ms']:.3f} ms"]
    if rate := figures.get("tflop_per_s"):
        notes.append(f"{rate:.0f} TFLOP/s")
    if share := figures.get("share_of_copy"):
        notes.append(f"{share:.0%} of copy")
    beside = figures["sides_ms"] if "sides_ms" in figures else figures["peers_ms"]
    return ", ".join(notes) + "; " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in beside.items())


class DeviceLost(Exception):
    """After this no call of the process reaches the device."""


def is_lost() -> bool:
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def completed(rows: Rows, record: Record, deadline: float, only: str = "") -> bool:
    """Runs what is not done yet; False where time ran out. A row gives its status, or figures of a passed one."""
    for key, run in rows:
        if record.done(key) or only not in key:
            continue
        if time.monotonic() > deadline:
            return False
        record.begin(key)
        try:
            found = run()
        except Exception as error:  # a row's trouble is its result; the others still run
            status = f"fail: {type(error).__name__}: {error}"
            print(f"{key}: {status}")
            is_fatal = is_lost()
            record.add(key, status, **({"fatal": True} if is_fatal else {}))
            if is_fatal:
                raise DeviceLost from error
            continue
        if isinstance(found, str):
            record.add(key, found)
        else:
            record.add(key, "pass", **found)
            print(f"{key}: {told(found)}")
    return True


def summary(record: Record) -> int:
    """Prints the table and the counts; returns how many rows failed."""
    counts: dict[str, dict[str, int]] = {}
    for key, row in record.rows.items():
        step, verdict = key.partition("/")[0], row["status"].partition(":")[0]
        by = counts.setdefault(step, {})
        by[verdict] = by.get(verdict, 0) + 1
    print(table(record.rows.values()))
    for step, by in counts.items():
        print(f"{step:<14}" + ", ".join(f"{count} {verdict}" for verdict, count in sorted(by.items())))
    return sum(by.get("fail", 0) for by in counts.values())


def steps_of(record: Record, is_rehearsal: bool) -> dict[str, Callable[[], Rows]]:
    """The rows of every step; nothing is computed before they are asked for."""
    device, names = (torch.device("cpu"), ("cpp",)) if is_rehearsal else (torch.device("cuda"), IMPLEMENTATIONS)
    times: Times = wall_times if is_rehearsal else event_times

    def bandwidth() -> float | None:
        return None if is_rehearsal else copy_bandwidth()

    def has_failed(prefix: str) -> bool:
        return any(key.startswith(prefix) and row["status"].startswith("fail") for key, row in record.rows.items())

    return {
        "compile": lambda: compiling(device.type),
        "conformance": lambda: conformance(names, device.type),
        "graphs": lambda: graphs(names, device),
        "bits": lambda: bits(names, device.type),
        "engine": lambda: engine_checks(device.type),
        "decode": lambda: decoding(device, times, bandwidth()),
        "prompt": lambda: prompts(device, times),
        "encode": lambda: encoding(device, times),
        "attention": lambda: attending(names, device, times, bandwidth()),
        "video": lambda: tiling(names, device, times),
        "timing": lambda: timed_rows(names, device, times, bandwidth(), has_failed),
        "sanitizer": sanitized,
    }


def opened(options: argparse.Namespace) -> Record:
    about = "CPU rehearsal" if options.rehearse else torch.cuda.get_device_name()
    return Record(options.json, about, options.keep)


def work(options: argparse.Namespace) -> int:
    """The child: all steps that were asked for."""
    record, deadline = opened(options), time.monotonic() + options.seconds
    print(f"{record.device}; {machine() | record.origin}")
    steps = steps_of(record, options.rehearse)
    try:
        in_time = all(
            completed(steps[step](), record, deadline, options.only) for step in STEPS if step in options.steps
        )
    except DeviceLost:
        sys.stdout.flush()
        os._exit(LOST)  # the driver's own farewell may hang
    failed = summary(record)
    return FAILED if failed else 0 if in_time else OUT_OF_TIME


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--seconds", type=float, default=460.0, help="stop after so long; started again, it goes on")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with its C++ kernels")
    parser.add_argument("--only", default="", help="rows whose key has this in it")
    parser.add_argument("--keep", action="store_true", help="rows that other code has shown are done too")
    parser.add_argument("--needs", action="store_true", help="print what needs a GPU, and why")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print these rows as a table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.needs:
        print(needs(IMPLEMENTATIONS))
        return 0
    if options.table:
        print(table(json.loads(line) for path in options.table for line in path.read_text().splitlines()))
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print(needs(IMPLEMENTATIONS))
        print(
            f"benchmarks/gpu.py: no GPU is visible to torch {torch.__version__}, so nothing was run. It needs a CUDA "
            "build of torch and a device, for what is listed above; --rehearse runs the rest on the CPU.",
            file=sys.stderr,
        )
        return NO_GPU
    if options.worker:
        return work(options)
    command = [sys.executable, *sys.argv, "--worker", "--seconds"]
    running = options.json.with_suffix(".running")
    code = supervise(command, running, lambda why: opened(options).bury(why), options.seconds, ROW_SECONDS)
    if code is None:
        return FAILED if summary(opened(options)) else OUT_OF_TIME
    return FAILED if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
