"""The vision tower: a SigLIP-shaped encoder of patches at native resolution.

Knows patches, grids and segments; must not know pixels' origin, merging or tokens. Patches of all items are packed
in raster order, index (f * gh + i) * gw + j within an item.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers import GeluMLP, LayerNorm, Linear, PackedContext, PatchAttention
from kvkeye.models.keye.config import VisionConfig
from kvkeye.models.keye.positions import MediaGrid


class VisionBlock(nn.Module):
    """Pre-norm block: attention, then feed-forward with tanh GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = PatchAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = GeluMLP(config.hidden_size, config.intermediate_size, tanh=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, context: PackedContext) -> Tensor:
        """[N, d] -> [N, d]."""
        x = x + self.self_attn(self.layer_norm1(x), cos, sin, context)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """Patches of pictures and clips to features.

    `joint_frames` says how far attention reaches in an item of several frames: over all of them (Preview) or over
    each frame alone (1.5).
    """

    def __init__(self, config: VisionConfig, joint_frames: bool) -> None:
        super().__init__()
        self.config, self.joint_frames = config, joint_frames
        self.patch_embedding = Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(config.grid_size, config.grid_size, config.hidden_size))
        nn.init.normal_(self.position_embedding, std=0.02)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, items: Sequence[MediaGrid]) -> Tensor:
        """pixel_values [N, 588], one row per patch -> features [N, d], in the order of `items`."""
        grids = [item.grid_thw for item in items]
        x = self.patch_embedding(pixel_values.to(self.position_embedding.dtype))  # [N, d]
        x = x + ops.interpolate_position(self.position_embedding, [size for grid in grids for size in grid])
        cos, sin = self._rotation(grids, x.device)
        context = PackedContext.from_lengths(self.segments(items), x.device)
        for layer in self.layers:
            x = layer(x, cos, sin, context)
        return self.post_layernorm(x)  # type: ignore[no-any-return]

    def segments(self, items: Sequence[MediaGrid]) -> list[int]:
        """Patches of each group that attends to itself."""
        lengths: list[int] = []
        for item in items:
            t, height, width = item.grid_thw
            joint = self.joint_frames or t == 1
            lengths += [t * height * width] if joint else [height * width] * t
        return lengths

    def _rotation(self, grids: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [N, D/2] fp32 of every patch."""
        tables = {
            (height, width): axial_angles(height, width, self.config.head_dim, self.config.rope_theta, device)
            for _, height, width in grids
        }
        angles = torch.cat([tables[height, width].repeat(t, 1) for t, height, width in grids])
        return angles.cos(), angles.sin()


def axial_angles(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles [rows * columns, D/2] fp32 of one frame: the first half turns by the row, the second by the column."""
    quarter = head_dim // 4
    exponent = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
    frequency = (theta**-exponent).float()
    row = torch.arange(rows, device=device).float()[:, None, None] * frequency
    column = torch.arange(columns, device=device).float()[None, :, None] * frequency
    shape = (rows, columns, quarter)
    return torch.cat((row.expand(shape), column.expand(shape)), -1).flatten(0, 1)
