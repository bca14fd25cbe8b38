"""CUDA tensors without a GPU: PyTorch's fake tensors, which have a device, a shape and no values.

Where devices are mixed, a value is read, or a copy from the host is waited for, an error says so: what would be wrong,
or would wait, on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)


class _PlainMemory(TorchFunctionMode):
    """Pinned memory needs a driver: it is plain memory, remembered as pinned. Copies of other memory are errors."""

    def __init__(self, is_strict: bool) -> None:
        super().__init__()
        self.is_strict = is_strict
        self._pinned: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            self._pinned.append(args[0])
            return args[0]
        is_pinned = func in (torch.empty, torch.tensor) and kwargs.pop("pin_memory", False)
        found = func(*args, **kwargs)
        if is_pinned:
            found.constant = None  # or `to` would move what a fake tensor remembers of its values, for real
            self._pinned.append(found)
        if self.is_strict and isinstance(found, Tensor):
            self._check(func, args, kwargs, found)
        return found

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any], found: Tensor) -> None:
        if func is torch.tensor:
            assert found.device.type == "cpu", "torch.tensor with a device copies from plain memory and waits"
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu) and args[0].device.type != found.device.type:
            assert found.device.type == "cuda", f"{func.__name__} reads a tensor [{tuple(found.shape)}] of the device"
            assert kwargs.get("non_blocking"), f"the host waits for a copy of {tuple(found.shape)} to the device"
            is_pinned = any(args[0] is pinned for pinned in self._pinned)
            assert is_pinned, f"a copy of {tuple(found.shape)} to the device comes from memory that is not pinned"


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
    assert x.device.type == source.device.type, f"a copy of {tuple(x.shape)} from {source.device} to {x.device}"
    copied: Tensor = torch.ops.aten.copy_.default(x, source, non_blocking)
    return copied


def zeros(shape: torch.Size) -> Any:
    return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


@contextmanager
def fake_gpu(reads: list[torch.Size] | None = None, answer: Callable[[torch.Size], Any] = zeros) -> Iterator[None]:
    """Within the block tensors are fake and "cuda" is a device. Pinned memory is plain memory.

    With `reads`, `tolist` of a tensor on the GPU gives `answer` of the shape and adds it, and copies to the device that
    the host waits for are errors; without, `tolist` is an error, as are all other ways to read a value.
    """
    tolist = FakeTensor.tolist

    def read(x: FakeTensor) -> Any:
        if reads is None or x.device.type != "cuda":
            return tolist(x)
        reads.append(x.shape)
        return answer(x.shape)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(FakeTensor, "tolist", read),
        _PlainMemory(is_strict=reads is not None),
        mock.patch.object(Tensor, "__getitem__", _item),
        mock.patch.object(Tensor, "copy_", _copy),
    ):
        yield
