"""CUDA tensors without a GPU: PyTorch's fake tensors, which have a device, a shape and no values.

Where devices are mixed, or a value is read, an error says so: what would be wrong, or would wait, on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)


class _PlainMemory(TorchFunctionMode):
    """Pinned memory needs a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs.pop("pin_memory", None)
        return args[0] if func is Tensor.pin_memory else func(*args, **kwargs)


def _item(x: Tensor, key: Any) -> Tensor:
    """`x[key]` by ops: Python's own indexing asks a CPU build of PyTorch for the device itself."""
    found, axis, indices = x, 0, []
    for part in key if isinstance(key, tuple) else (key,):
        if part is Ellipsis:
            axis += x.dim() - len(key) + 1
        elif isinstance(part, int):
            found = found.select(axis, part)
        elif isinstance(part, slice):
            found = torch.ops.aten.slice.Tensor(found, axis, part.start, part.stop, part.step or 1)
            axis += 1
        elif part is None:
            found, axis = found.unsqueeze(axis), axis + 1
        else:
            indices += [None] * (axis - len(indices)) + [part]
            axis += 1
    return torch.ops.aten.index.Tensor(found, indices) if indices else found


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    copied: Tensor = torch.ops.aten.copy_.default(x, source, non_blocking)
    return copied


def _zeros(shape: torch.Size) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


@contextmanager
def fake_gpu(reads: list[torch.Size] | None = None) -> Iterator[None]:
    """Within the block tensors are fake and "cuda" is a device. Pinned memory is plain memory.

    With `reads`, `tolist` of a tensor on the GPU gives zeros and adds the shape; without, it is an error, as are all
    other ways to read a value.
    """
    tolist = FakeTensor.tolist

    def read(x: FakeTensor) -> Any:
        if reads is None or x.device.type != "cuda":
            return tolist(x)
        reads.append(x.shape)
        return _zeros(x.shape)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(FakeTensor, "tolist", read),
        _PlainMemory(),
        mock.patch.object(Tensor, "__getitem__", _item),
        mock.patch.object(Tensor, "copy_", _copy),
    ):
        yield
