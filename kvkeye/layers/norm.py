"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeye import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis. weight [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.rms_norm(x, self.weight, self.eps)
        return y

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(normalised sum, sum) of x and the residual stream."""
        y, total = ops.add_rms_norm(x, residual, self.weight, self.eps)
        return y, total

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis. weight, bias [D]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = ops.layer_norm(x, self.weight, self.bias, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
