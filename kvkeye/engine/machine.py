"""What the machine offers: memory and the number format it computes fast. Knows no model."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

MIB = 1 << 20
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as Linux names them; empty where there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU and where the CPU multiplies it natively, else fp32."""
    if device.type == "cuda" or cpu_flags() & _BF16_FLAGS:
        return torch.bfloat16
    return torch.float32


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken now without swapping."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _cgroup_bytes())
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_bytes() -> int:
    """What the container's limit leaves; a huge number without one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 1 << 62
    return (1 << 62) if limit == "max" else max(0, int(limit) - used)


def gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
