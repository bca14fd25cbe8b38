"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one weight [2I, H], gate first; no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.silu_mul(self.gate_up_proj(x)))  # type: ignore[no-any-return]


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases; `tanh` chooses the approximation over the exact form."""

    def __init__(self, hidden_size: int, intermediate_size: int, tanh: bool) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)
        self.tanh = tanh

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x), self.tanh))  # type: ignore[no-any-return]
