"""Geometries of the vision tower, and what a pass over some patches costs."""

from __future__ import annotations

from kvkeye.models.keye.config import VisionConfig

SIGLIP = VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
    patch_size=14, spatial_merge_size=2, tokens_per_second=2.0,
)  # fmt: skip
TINY = VisionConfig(
    hidden_size=144, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=98,
    patch_size=14, spatial_merge_size=2, tokens_per_second=2.0,
)  # fmt: skip


def num_flops(config: VisionConfig, patches: int, pictures: int = 1) -> float:
    """Of the tower over `pictures` of `patches` each."""
    d, wide = config.hidden_size, config.intermediate_size
    per_layer = 2 * patches * (4 * d * d + 2 * d * wide) + 4 * patches**2 * d
    return float(pictures * (config.num_hidden_layers * per_layer + 2 * patches * d * config.patch_dim))
