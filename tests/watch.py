"""Refuses what makes the host wait for the device. Run on the meta device, where there is no value to read either."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("item", "_local_scalar_dense", "tolist", "equal", "is_nonzero", "nonzero", "masked_select", "unique")


class Watch(TorchDispatchMode):
    """Names of the ops that ran, and a refusal of those that read a value or cross devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.split(".")[-1]
        assert not any(name.startswith(read) for read in HOST_READS), f"{name} reads a value"
        self.seen.append(name)
        result = func(*args, **(kwargs or {}))
        devices = {x.device for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(x)}
        assert len(devices) <= 1, f"{name} copies between {devices}"
        return result
