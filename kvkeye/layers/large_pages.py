"""Memory in large pages for weights, which are read from end to end at every step.

A weight of a few MB in an allocation of its own is mostly in small pages: only whole aligned ones of 2 MB can be large,
and at every small one the processor stops reading ahead. Weights that share an allocation lie in large ones throughout.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20
_SEGMENT = 32 * _PAGE  # memory behind the last weight is never touched
_LINE = 64


class LargePages:
    """Copies tensors into shared memory in large pages, which is given back when the last of them goes.

    On the CPU of a system that has such pages; elsewhere tensors stay what they are.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy. tensor of any shape and dtype, contiguous."""
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.numel() == 0:
            return tensor
        size = -(-tensor.nbytes // _LINE) * _LINE
        if size > self._free.numel():
            self._free = _segment(max(size, _SEGMENT))
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _segment(size: int) -> Tensor:
    """[size] bytes, aligned to a large page."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    return data[-data.data_ptr() % _PAGE :][:size]
