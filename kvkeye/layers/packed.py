"""A weight matrix that is plain for training and packed for inference on the CPU.

Knows both forms and keeps one of them. A state dict always holds the plain form: loading one repacks, moving or
converting the module makes it plain again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers.large_pages import LargePages


class PackableWeight(nn.Module):
    """Base of modules with one matrix `weight` [O, K].

    weight   the parameter, or None while packed
    packed   ops.pack_weight of it, or the levels of ops.quantize_weight, or None while plain
    scales   of the levels, or None while the weight is exact
    parts    2 where the outputs are two halves that are multiplied with each other
    """

    weight: nn.Parameter | None
    packed: Tensor | None
    scales: Tensor | None

    def __init__(self, outputs: int, inputs: int, parts: int = 1) -> None:
        super().__init__()
        self.outputs, self.inputs, self.parts = outputs, inputs, parts
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.dtype = self.weight.dtype
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("scales", None, persistent=False)

    @torch.no_grad()
    def pack(self) -> None:
        """Replaces the weight by its packed form: for inference, until unpack()."""
        if self.weight is not None:
            self.packed = ops.pack_weight(self.weight, self.parts, ops.values_per_word(self.weight.dtype))
            self.weight = None

    @torch.no_grad()
    def quantize(self) -> None:
        """Replaces the weight by int8 levels: for inference. What rounding took is lost."""
        if self.weight is not None:
            self.dtype = self.weight.dtype
            self.packed, self.scales = ops.quantize_weight(self.weight, self.parts)
            self.weight = None

    @torch.no_grad()
    def unpack(self) -> None:
        """Back to a plain weight."""
        if self.packed is not None:
            self.weight = nn.Parameter(self.plain_weight())
            self.packed = self.scales = None

    def plain_weight(self) -> Tensor:
        """[O, K]: the parameter, or a copy made from the packed form; of int8 levels, what they stand for."""
        if self.weight is not None:
            return self.weight
        assert self.packed is not None
        if self.scales is not None:
            return ops.dequantize_weight(self.packed, self.scales, self.inputs).to(self.dtype)
        return ops.unpack_weight(self.packed, self.outputs // self.parts, self.inputs).contiguous()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed, quantized = self.packed is not None, self.scales is not None
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if quantized:
            self.quantize()
        elif packed:
            self.pack()


def pack_weights(model: nn.Module) -> int:
    """Packs the weights of a model for inference, one at a time; returns how many.

    None where compiled CPU kernels would not run: on a GPU, without the library, or with other backends chosen.
    """
    count, memory = 0, LargePages()
    for module in model.modules():
        if isinstance(module, PackableWeight) and module.weight is not None and module.packed is None:
            weight = module.weight
            if ops.pack_weight.select(weight, module.parts, ops.values_per_word(weight.dtype))[0] != "cpp":
                return count
            module.pack()
            if module.packed is not None:
                module.packed = memory.copy(module.packed)
                count += 1
    return count


def quantize_weights(model: nn.Module) -> int:
    """Turns the weights of a model into int8 levels for inference on the CPU, one at a time; returns how many."""
    modules = [module for module in model.modules() if isinstance(module, PackableWeight)]
    memory = LargePages()
    for module in modules:
        module.quantize()
        if module.packed is not None:
            module.packed = memory.copy(module.packed)
    return sum(module.scales is not None for module in modules)
