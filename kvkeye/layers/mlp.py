"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from kvkeye.layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one weight [2I, H], gate first; no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False, parts=2)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H], added to `residual` if there is one."""
        inner = self.gate_up_proj.silu_mul(x)
        return self.down_proj(inner) if residual is None else self.down_proj.add(inner, residual)


class GeluMLP(nn.Module):
    """fc2(gelu(fc1(x))) with biases; `tanh` chooses the approximation over the exact form."""

    def __init__(self, hidden_size: int, intermediate_size: int, tanh: bool) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)
        self.tanh = tanh

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H], added to `residual` if there is one."""
        inner = self.fc1.gelu(x, self.tanh)
        return self.fc2(inner) if residual is None else self.fc2.add(inner, residual)
