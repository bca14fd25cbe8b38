"""Memory in large pages for weights and caches, which are read at every step.

A weight of a few MB in an allocation of its own is mostly in small pages: only whole aligned ones of 2 MB can be large,
and at every small one the processor stops reading ahead. Tensors that share an allocation lie in large ones throughout.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_PAGE = 2 << 20
_SEGMENT = 32 * _PAGE  # memory behind the last tensor is never touched
_LINE = 64


class LargePages:
    """Tensors in shared memory in large pages, which is given back when the last of them goes.

    On the CPU of a system that has such pages; elsewhere tensors are torch's.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy. tensor of any shape and dtype, contiguous."""
        if not _has_them(tensor.device) or tensor.numel() == 0:
            return tensor
        return self._take(tensor.shape, tensor.dtype).copy_(tensor)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros, which take no memory before they are written."""
        if not _has_them(device) or prod(shape) == 0:
            return torch.zeros(shape, dtype=dtype, device=device)
        return self._take(shape, dtype)

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory that nobody has had, so it is zero."""
        wanted = prod(shape) * dtype.itemsize
        size = -(-wanted // _LINE) * _LINE
        if size > self._free.numel():
            self._free = _segment(max(size, _SEGMENT))
        place, self._free = self._free[:wanted], self._free[size:]
        return place.view(dtype).view(shape)


def _has_them(device: torch.device) -> bool:
    return device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def _segment(size: int) -> Tensor:
    """[size] bytes, aligned to a large page."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    return data[-data.data_ptr() % _PAGE :][:size]
