"""Triton's kernels of the conformance rows, compiled side by side before the rows run.

There are hundreds: each size of a model is a constant. They are compiled as a launch compiles them and land in
Triton's own cache, where the rows find them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from _gpu_checks import DTYPES

from kvkeye import ops
from kvkeye.testing.case import Sample, good
from kvkeye.testing.gradients import gradient_arguments

SLOW = ("attention", "video_fusion")  # families that come first


def compiled(name: str, dtype: str, device: str) -> int:
    """Compiles what the rows of one op in one dtype launch; how many launches they are. For a process of its own."""
    from kvkeye.triton_kernels.common import launch as launching

    count = 0

    def warm(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal count
        kernel.warmup(*args, grid=grid, **options)
        count += 1

    launching._start = warm
    op = ops.OPS[name]
    implementation = op.implementations["triton"]
    source = next((each for each in ops.OPS.values() if each.backward is op), None)
    for case in good((source or op).name, Sample(DTYPES[dtype], device)):
        arguments = gradient_arguments(source, case, seed=1) if source else case.args
        if implementation.refuses is None or not any(implementation.refuses(*arguments)):
            implementation.call(*arguments)
    return count


def tasks() -> list[tuple[str, str]]:
    """(op, dtype) of every cell."""
    found = [op for op in ops.OPS.values() if "triton" in op.implementations]
    found.sort(key=lambda op: op.family not in SLOW)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [(op.name, names[dtype]) for op in found for dtype in op.implementations["triton"].dtypes]


def compile_all(device: str, processes: int, cells: list[tuple[str, str]]) -> str:
    start = time.monotonic()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        counts = list(pool.map(compiled, *zip(*cells, strict=True), [device] * len(cells)))
    return f"pass: {sum(counts)} launches in {time.monotonic() - start:.0f} s with {processes} processes"


def compiling(device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """(key, what to do): one row."""
    if device == "cpu":
        yield "compile/triton", lambda: "refuse: Triton finds no GPU to compile for"
        return
    yield "compile/triton", partial(compile_all, device, max(1, min(16, (os.cpu_count() or 1) - 1)), tasks())
