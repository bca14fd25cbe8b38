"""The vision tower: a SigLIP-shaped encoder of patches at native resolution.

Knows patches, grids and segments; must not know pixels' origin, merging or tokens. Patches of all items are packed
in raster order, index (f * gh + i) * gw + j within an item. Items of any number of requests may share a pack: none
changes another's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers import GeluMLP, LayerNorm, Linear, PackedContext, PatchAttention
from kvkeye.models.keye.config import VisionConfig
from kvkeye.models.keye.grid_cache import GridCache
from kvkeye.models.keye.positions import MediaGrid

# Of position rows and of rotations each: five pictures of a megapixel in bf16, or many frames of one size.
GRID_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class PackLayout:
    """What the blocks of the tower need to know of a pack, complete before the first of them runs.

    positions  [N, d] rows of the interpolated position table, dtype of the table
    cos, sin   [N, D/2] fp32
    context    segments: cu_seqlens on the device, the longest on the host
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    context: PackedContext


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
        x = self.self_attn(self.layer_norm1(x), cos, sin, context, x)
        return self.mlp(self.layer_norm2(x), x)  # type: ignore[no-any-return]


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
        self._position_cache, self._rotation_cache = GridCache(GRID_CACHE_BYTES), GridCache(GRID_CACHE_BYTES)

    def forward(self, pixel_values: Tensor, items: Sequence[MediaGrid]) -> Tensor:
        """pixel_values [N, 588], one row per patch -> features [N, d], in the order of `items`."""
        return self.encode(pixel_values, self.layout(items))

    def layout(self, items: Sequence[MediaGrid]) -> PackLayout:
        """Everything about a pack that the host decides. Tables of sizes seen before come from a cache."""
        context = PackedContext.from_lengths(self.segments(items), self.position_embedding.device)
        return PackLayout(*self.tables(items), context)

    def tables(self, items: Sequence[MediaGrid]) -> tuple[Tensor, Tensor, Tensor]:
        """positions [N, d], cos and sin [N, D/2] of a pack's patches."""
        grids = [item.grid_thw for item in items]
        return (self._positions(grids), *self._rotation(grids))

    def encode(self, pixel_values: Tensor, layout: PackLayout) -> Tensor:
        """pixel_values [N, 588] -> features [N, d]. Reads nothing back from the device."""
        x = self.patch_embedding(pixel_values.to(self.position_embedding.dtype)) + layout.positions  # [N, d]
        for layer in self.layers:
            x = layer(x, layout.cos, layout.sin, layout.context)
        return self.post_layernorm(x)  # type: ignore[no-any-return]

    def segments(self, items: Sequence[MediaGrid]) -> list[int]:
        """Patches of each group that attends to itself."""
        lengths: list[int] = []
        for item in items:
            t, height, width = item.grid_thw
            joint = self.joint_frames or t == 1
            lengths += [t * height * width] if joint else [height * width] * t
        return lengths

    def _positions(self, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """[N, d]: interpolated in fp32, rounded once to the table's dtype; the same rows for each frame of an item."""
        table = self.position_embedding
        learns = torch.is_grad_enabled() and table.requires_grad
        if torch.compiler.is_compiling() or learns or table.is_inference():
            rows: Tensor = ops.interpolate_position(table, [size for grid in grids for size in grid])
            return rows
        # Changes of the table are seen as autograd sees them: not those made through `.data` of the same storage.
        version = (table.data_ptr(), table._version, table.dtype, table.device)

        def frame(height: int, width: int) -> Tensor:
            return self._position_cache.get(
                (version, height, width), lambda: (ops.interpolate_position(table, [1, height, width]),)
            )[0]

        return torch.cat([part for t, height, width in grids for part in [frame(height, width)] * t])

    def _rotation(self, grids: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """cos and sin [N, D/2] fp32 of every patch."""
        device = self.position_embedding.device

        def build(height: int, width: int) -> tuple[Tensor, ...]:
            angles = axial_angles(height, width, self.config.head_dim, self.config.rope_theta, device)
            return angles.cos(), angles.sin()

        def frame(height: int, width: int) -> tuple[Tensor, ...]:
            if torch.compiler.is_compiling():
                return build(height, width)
            return self._rotation_cache.get((device, height, width), lambda: build(height, width))

        tables = [frame(height, width) for t, height, width in grids for _ in range(t)]
        return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])


def axial_angles(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles [rows * columns, D/2] fp32 of one frame: the first half turns by the row, the second by the column."""
    quarter = head_dim // 4
    exponent = torch.arange(quarter, dtype=torch.float64, device=device) / quarter
    frequency = (theta**-exponent).float()
    row = torch.arange(rows, device=device).float()[:, None, None] * frequency
    column = torch.arange(columns, device=device).float()[None, :, None] * frequency
    shape = (rows, columns, quarter)
    return torch.cat((row.expand(shape), column.expand(shape)), -1).flatten(0, 1)
