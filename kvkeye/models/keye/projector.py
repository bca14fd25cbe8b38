"""The projector `mlp_AR`: 2x2 patches of the vision tower to one token of the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
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
        return self._project(features, lambda rows: ops.merge_patches(rows, sizes, self.merge_size))

    def gather(self, features: Tensor, merge_rows: Tensor) -> Tensor:
        """The same with the windows' patches in a tensor on the device: merge_rows [N] int64, window by window."""
        return self._project(features, lambda rows: rows[merge_rows].view(-1, self.merge_size**2 * rows.shape[1]))

    def merge_rows(self, items: Sequence[MediaGrid]) -> Tensor:
        """[N] int64 on the host: the patches of each merge x merge window in raster order, windows in raster order."""
        found, first = [], 0
        for item in items:
            t, height, width = item.grid_thw
            windows = (t, height // self.merge_size, self.merge_size, width // self.merge_size, self.merge_size)
            rows = torch.arange(first, first + item.num_patches).view(windows)
            found.append(rows.transpose(2, 3).flatten())
            first += item.num_patches
        return torch.cat(found)

    def _project(self, features: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
        merged = merge(self.pre_norm(features)) if self.norm_first else self.pre_norm(merge(features))
        return self.linear_2(self.linear_1.gelu(merged, False))  # type: ignore[no-any-return]
