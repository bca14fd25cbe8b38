"""How the benchmarks measure: sides take turns, medians count, a row carries its bars and its share of the limit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _limits import Limits

Call = Callable[[], Any]
LONG = 5.0  # seconds; a call this long needs no warm-up and may run once


def median_times(sides: list[Call], seconds: float) -> list[float]:
    """Median seconds per call of each side, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for side, record in zip(sides, times):
            start = time.perf_counter()
            side()
            record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


@dataclass(frozen=True)
class Peer:
    """Another implementation at one setting; the best setting of a group counts."""

    group: str
    setting: str
    run: Call = lambda: None

    @property
    def name(self) -> str:
        return f"{self.group}, {self.setting}" if self.setting else self.group


@dataclass(frozen=True)
class Bar:
    """Ours must be at least `factor` times as fast as the best setting of `group`."""

    group: str
    factor: float


@dataclass(frozen=True)
class Row:
    """One comparison. `verify` gets every side's output of the first round, ours first, and raises on disagreement.

    flops     of one call; `least_vector` is a bar on the share of the vector units' limit
    bytes     read and written; compared with the copy bandwidth
    streamed  bytes that must be read at least; compared with the read bandwidth, of which `least_read` is a bar
    """

    name: str
    peers: Sequence[Peer]
    bars: Sequence[Bar]
    ours: Call = lambda: None
    verify: Callable[[list[Any]], None] = lambda outputs: None
    flops: float = 0.0
    bytes: float = 0.0
    streamed: float = 0.0
    least_read: float = 0.0
    least_vector: float = 0.0


@dataclass
class Result:
    """Seconds per side; the first is ours."""

    row: Row
    times: list[list[float]] = field(default_factory=list)

    @property
    def medians(self) -> list[float]:
        return [statistics.median(record) for record in self.times]

    def best_peer(self, group: str) -> tuple[str, float] | None:
        found = [(t, p.name) for p, t in zip(self.row.peers, self.medians[1:]) if p.group == group]
        return min(found)[::-1] if found else None

    def judged(self, limits: Limits) -> Iterator[dict[str, Any]]:
        if self.row.least_read:
            share, least = self.shares(limits)["read"], self.row.least_read
            yield {"against": "the read bandwidth", "ratio": share, "required": least, "met": share >= least}
        if self.row.least_vector:
            share, least = self.shares(limits)["vector"], self.row.least_vector
            yield {"against": "the vector FLOP/s", "ratio": share, "required": least, "met": share >= least}
        for bar in self.row.bars:
            best = self.best_peer(bar.group)
            if best is not None:
                ratio = best[1] / self.medians[0]
                yield {"against": best[0], "ratio": ratio, "required": bar.factor, "met": ratio >= bar.factor}

    def shares(self, limits: Limits) -> dict[str, float]:
        """Time that the limit needs over our time; of arithmetic the vector units' limit, and the tiles' if lent."""
        own = self.medians[0]
        shares = {}
        if self.row.bytes:
            shares["copy"] = self.row.bytes / own / limits.copy
        if self.row.streamed:
            shares["read"] = self.row.streamed / own / limits.read
        if self.row.flops:
            shares["vector"] = self.row.flops / own / max(limits.fp32, limits.dot)
            if limits.tiles:
                shares["tiles"] = self.row.flops / own / limits.tiles
        return shares


def compare(row: Row, seconds: float) -> Result:
    """Checks outputs in a first round, then lets the sides take turns for `seconds`.

    The first round warms up and is not counted, unless it alone takes long.
    """
    calls = [row.ours, *(peer.run for peer in row.peers)]
    outputs, first = zip(*(_timed(call) for call in calls))
    row.verify(list(outputs))
    is_long = max(first) > LONG
    result = Result(row, [[t] if is_long else [] for t in first])
    del outputs
    fewest = 5 if max(first) < LONG / 10 else 3 if sum(first) < 4 * LONG else 1
    end = time.perf_counter() + seconds - is_long * sum(first)
    while len(result.times[0]) < fewest or time.perf_counter() + sum(first) < end:
        for call, times in zip(calls, result.times):
            times.append(_timed(call)[1])
    return result


def _timed(call: Call) -> tuple[Any, float]:
    start = time.perf_counter()
    output = call()
    return output, time.perf_counter() - start


def show(result: Result, limits: Limits) -> None:
    """The row as lines of text."""
    own, *others = result.medians
    rounds = min(len(record) for record in result.times)
    print(f"{result.row.name}  ({rounds} rounds)")
    rate = f"   {result.row.flops / own / 1e9:.0f} GFLOP/s" if result.row.flops else ""
    rate += f"   {result.row.streamed / own / 1e9:.1f} GB/s" if result.row.streamed else ""
    shares = ", ".join(f"{share:.0%} of {name}" for name, share in result.shares(limits).items())
    print(f"  {'kvkeye':<58}{milliseconds(own):>11}{rate}   {shares}")
    for peer, seconds in zip(result.row.peers, others):
        print(f"  {peer.name:<58}{milliseconds(seconds):>11}{seconds / own:>8.2f}x")
    for judged in result.judged(limits):
        verdict = "pass" if judged["met"] else "MISS"
        print(f"  {verdict}: {judged['ratio']:.2f} times {judged['against']}; required {judged['required']:.3g}")


def record(result: Result, limits: Limits) -> dict[str, Any]:
    """The row for a file of JSON lines."""
    own, *others = result.medians
    return {
        "row": result.row.name,
        "ms": own * 1e3,
        "rounds": min(len(times) for times in result.times),
        "peers_ms": {peer.name: seconds * 1e3 for peer, seconds in zip(result.row.peers, others)},
        "bars": list(result.judged(limits)),
        "gflop_per_s": result.row.flops / own / 1e9,
        "gb_per_s": (result.row.bytes or result.row.streamed) / own / 1e9,
        "shares": result.shares(limits),
    }


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds > 1 else f"{seconds * 1e3:.3g} ms"


def machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(), "cpu": _cpu_name(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "mkl_enable_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
    }  # fmt: skip


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def append(path: Path | None, data: dict[str, Any]) -> None:
    """Adds one JSON line."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(data) + "\n")


def parser(description: str | None, rows: Sequence[str], seconds: float) -> argparse.ArgumentParser:
    """The options that all comparisons share."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--rows", nargs="*", choices=list(rows), default=list(rows), help="only these rows")
    found.add_argument("--seconds", type=float, default=seconds, help="time per row")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--json", type=Path, help="append the rows to this file")
    found.add_argument("--no-tiles", action="store_true", help="keep torch's side from AMX tiles (see _isa.py)")
    found.add_argument("--quick", action="store_true", help="tiny shapes: shows that the script works, no figures")
    return found
