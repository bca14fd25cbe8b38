"""Where a result lies: in memory that was freed before, or in fresh pages that the system clears at first touch."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets malloc hand out again what is freed, at every size; False where it is not glibc's.

    Left alone it maps blocks of 32 MiB and more afresh at each call, and returns them when they are freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def page_faults(call: Callable[[], Any], calls: int = 3) -> int:
    """Pages per call that the system hands out; one call goes before."""
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // calls
