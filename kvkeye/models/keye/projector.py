"""The projector `mlp_AR`: 2x2 patches of the vision tower to one token of the language model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers import LayerNorm, Linear
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.positions import MediaGrid

# A constant of the reference, absent from config.json; the tower's own norms use layer_norm_eps.
EPS = 1e-5


class Projector(nn.Module):
    """Norm, merge and two linear layers with exact GELU. Preview normalises each patch, 1.5 the merged window."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.merge_size = config.vision.spatial_merge_size
        self.norm_first = config.version == "preview"
        merged = config.vision.hidden_size * self.merge_size**2
        self.pre_norm = LayerNorm(config.vision.hidden_size if self.norm_first else merged, EPS)
        self.linear_1 = Linear(merged, merged)
        self.linear_2 = Linear(merged, config.text.hidden_size)

    def forward(self, features: Tensor, items: Sequence[MediaGrid]) -> Tensor:
        """features [N, d] of all items in raster order -> [N / merge^2, hidden]."""
        sizes = [size for item in items for size in item.grid_thw]
        if self.norm_first:
            merged = ops.merge_patches(self.pre_norm(features), sizes, self.merge_size)
        else:
            merged = self.pre_norm(ops.merge_patches(features, sizes, self.merge_size))
        return self.linear_2(self.linear_1.gelu(merged, False))  # type: ignore[no-any-return]
