"""Host tensors to a device by one copy that nothing waits for, and back by one read.

Knows bytes; must not know what they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, that of the device's own allocations: kernels load 16 bytes at a time
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Where tensors of these shapes and dtypes lie in one buffer; those of a beginning of the list lie the same."""

    parts: tuple[tuple[torch.Size, torch.dtype], ...]
    offsets: tuple[int, ...]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Layout:
        parts = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        offsets, end = [], 0
        for shape, dtype in parts:
            offsets.append(end)
            end += -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(parts, tuple(offsets), end)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in `buffer` [num_bytes] uint8."""
        return [
            buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (shape, dtype), offset in zip(self.parts, self.offsets)
        ]


def staged(tensors: Sequence[Tensor], pinned: bool) -> Tensor:
    """Host tensors in one host buffer [num_bytes] uint8, by their `Layout`.

    Pinned memory comes from PyTorch's cache, which hands it out again when the copies from it are done.
    """
    layout = Layout.of(tensors)
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=pinned)
    for view, tensor in zip(layout.views(buffer), tensors):
        view.copy_(tensor)
    return buffer


def sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on `device`, by a copy that nothing waits for."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, by a copy that nothing waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def read(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of 1-d tensors, by one read of the device in fp64, which holds ids and fp32 exactly."""
    if len(tensors) == 1:
        return [tensors[0].tolist()]
    values = iter(torch.cat([tensor.double() for tensor in tensors]).tolist())
    return [list(islice(values, len(tensor))) for tensor in tensors]


def to_device(batch: T, device: torch.device) -> tuple[T, Tensor]:
    """A dataclass with its tensors, those of dataclasses inside too, on `device`, and the buffer that holds them.

    Tensors lie in the order of the fields. The copy does not wait for the device, nor the host for the copy.
    """
    tensors = list(tensors_of(batch))
    buffer = staged(tensors, pinned=device.type == "cuda").to(device, non_blocking=True)
    return _with_tensors(batch, iter(Layout.of(tensors).views(buffer))), buffer


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a dataclass and of dataclasses inside, in the order of the fields."""
    for part in fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def _with_tensors(batch: Any, arrived: Iterator[Tensor]) -> Any:
    values = {}
    for part in fields(batch):
        value = getattr(batch, part.name)
        if isinstance(value, Tensor):
            values[part.name] = next(arrived)
        elif is_dataclass(value):
            values[part.name] = _with_tensors(value, arrived)
    return replace(batch, **values)
