"""What this machine can do at most, measured in the run that compares with it: arithmetic and memory.

The loops are in `_limits.c`, compiled for the machine. Without a C compiler torch's own large products and sums stand
in, and `source` says so.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Best of a few repeats at `threads` threads; bytes and operations per second.

    fp32  multiply-add in fp32 registers      bf16   the faster of bf16 dot products, bf16 tiles and widening to fp32
    read  memory larger than the caches       copy   torch's copy of 256 MB, read plus written
    """

    threads: int
    fp32: float
    dot: float
    tiles: float
    read: float
    copy: float
    source: str

    @property
    def bf16(self) -> float:
        return max(self.fp32, self.dot, self.tiles)

    def __str__(self) -> str:
        giga = {name: f"{getattr(self, name) / 1e9:.0f}" for name in ("fp32", "dot", "tiles")}
        return (
            f"limits with {self.threads} threads ({self.source}): fp32 {giga['fp32']} GFLOP/s; bf16 dot products "
            f"{giga['dot']}, tiles {giga['tiles']} (0: none lent); read {self.read / 1e9:.1f} GB/s, "
            f"copy {self.copy / 1e9:.1f} GB/s"
        )

    def row(self) -> dict[str, Any]:
        names = ("fp32", "dot", "tiles", "read", "copy")
        return {f"limit_{name}_g": round(getattr(self, name) / 1e9, 1) for name in names}


def measure_limits(read_bytes: int = 1024 * MIB) -> Limits:
    """Takes two seconds. `read_bytes` should be what the compared code streams: caches may hold less."""
    threads = torch.get_num_threads()
    copy = _torch_copy()
    library = _library()
    if library is None:
        fp32, dot = (_torch_product(dtype) for dtype in (torch.float32, torch.bfloat16))
        return Limits(threads, fp32, dot, 0.0, _torch_read(read_bytes), copy, "torch's products and sums")
    with ThreadPoolExecutor(threads) as pool:
        fp32, dot, tiles = (_rate(library, pool, threads, name) for name in ("fp32_flops", "bf16_flops", "tile_flops"))
        read = _read_rate(library, pool, threads, read_bytes)
    return Limits(threads, fp32, dot, tiles, read, copy, "register-only loops, plain reads")


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "limits.so"
        source = Path(__file__).with_name("_limits.c")
        command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", str(target), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None
        library = ctypes.CDLL(str(target))
    for name in ("fp32_flops", "bf16_flops", "tile_flops"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int64]
    library.read_bytes.restype = ctypes.c_uint64
    library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def _best(work: Callable[[], float], repeats: int) -> float:
    """Largest amount per second."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - start))
    return best


def _rate(library: ctypes.CDLL, pool: ThreadPoolExecutor, threads: int, name: str) -> float:
    rounds = [1_000_000 if name != "tile_flops" else 200_000] * threads
    return _best(lambda: sum(pool.map(getattr(library, name), rounds)), 12)


def read_meter(size: int = 512 * MIB) -> Callable[[], float]:
    """Bytes per second, best of a few reads of `size` bytes by all threads: takes turns with what a row times.

    A shared machine's bandwidth changes by the second, and by half.
    """
    library, threads = _library(), torch.get_num_threads()
    if library is None:
        return lambda: _torch_read(size)
    pool = ThreadPoolExecutor(threads)
    read, amount = _reader(library, pool, threads, size)
    return lambda: _best(lambda: (read(), amount)[1], 4)


def _read_rate(library: ctypes.CDLL, pool: ThreadPoolExecutor, threads: int, size: int) -> float:
    read, amount = _reader(library, pool, threads, size)
    return _best(lambda: (read(), amount)[1], 8)


def _reader(
    library: ctypes.CDLL, pool: ThreadPoolExecutor, threads: int, size: int
) -> tuple[Callable[[], None], float]:
    """A function that reads memory of its own, every thread a part, and how many bytes."""
    part = max(256, size // threads // 256 * 256)
    memory = mmap.mmap(-1, part * threads + 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # large pages
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    data.fill_(1)
    start = -(-data.data_ptr() // (2 * MIB)) * 2 * MIB

    def read() -> None:
        list(pool.map(lambda i: library.read_bytes(start + i * part, part), range(threads)))
        assert data.numel() >= part * threads  # keeps the memory

    return read, float(part * threads)


def _torch_product(dtype: torch.dtype) -> float:
    a = torch.randn(2048, 2048).to(dtype)
    torch.mm(a, a)
    return _best(lambda: (torch.mm(a, a), 2.0 * 2048**3)[1], 5)


def _torch_read(size: int) -> float:
    data = torch.ones(size // 4)
    return _best(lambda: (data.sum(), float(size))[1], 5)


def _torch_copy() -> float:
    source = torch.ones(64 * MIB)
    target = torch.empty_like(source)
    target.copy_(source)
    return _best(lambda: (target.copy_(source), 2.0 * source.nbytes)[1], 5)


if __name__ == "__main__":
    print(measure_limits())
