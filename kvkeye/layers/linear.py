"""The linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeye import ops


class Linear(nn.Module):
    """y = x W^T + b with one order of summation for every number of rows. weight [O, K], bias [O] or None."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / K, zero bias."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        y: Tensor = ops.packed_linear(x, self.weight, self.bias)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, bias={self.bias is not None}"
