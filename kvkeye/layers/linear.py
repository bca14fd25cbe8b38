"""The linear layer, and what follows it in a layer of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers.packed import PackableWeight


class Linear(PackableWeight):
    """y = x W^T + b with one order of summation for every number of rows. weight [O, K], bias [O] or None.

    gelu, add and silu_mul are y and the next step of the layer, in one pass where the weight is packed (of int8 all
    but gelu) and with the same bits where it is not. parts=2: the rows of a gate come first, those of what it
    multiplies second.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, parts: int = 1) -> None:
        super().__init__(out_features, in_features, parts)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / K, zero bias."""
        assert self.weight is not None
        nn.init.normal_(self.weight, std=self.inputs**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        if self.packed is None or self.parts > 1:
            y: Tensor = ops.packed_linear(x, self.plain_weight(), self.bias)
        elif self.scales is not None:
            y = ops.int8_linear(x, self.packed, self.scales, self.bias)
        else:
            y = ops.prepacked_linear(x, self.packed, self.bias, self.outputs)
        return y

    def gelu(self, x: Tensor, tanh: bool) -> Tensor:
        """gelu(y): [..., K] -> [..., O]."""
        if self.packed is None or self.scales is not None:
            y: Tensor = ops.gelu(self(x), tanh)
        else:
            y = ops.prepacked_linear_gelu(x, self.packed, self.bias, self.outputs, tanh)
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y: [..., K] and [..., O] -> [..., O]."""
        if self.packed is None:
            return residual + self(x)  # type: ignore[no-any-return]
        if self.scales is not None:
            y: Tensor = ops.int8_linear_add(x, self.packed, self.scales, self.bias, residual)
        else:
            y = ops.prepacked_linear_add(x, self.packed, self.bias, residual)
        return y

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(first half of y) * second half: [..., K] -> [..., O / 2]. Of a layer of two parts without bias."""
        if self.packed is None:
            y: Tensor = ops.silu_mul(self(x))
        elif self.scales is not None:
            y = ops.int8_linear_silu_mul(x, self.packed, self.scales)
        else:
            y = ops.prepacked_linear_silu_mul(x, self.packed, self.outputs // 2)
        return y

    def extra_repr(self) -> str:
        form = "" if self.packed is None else ", packed" if self.scales is None else ", int8"
        return f"{self.inputs} -> {self.outputs}, bias={self.bias is not None}{form}"
