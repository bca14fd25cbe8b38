"""Long videos from overlapping tiles: fused model outputs, fused attention."""

from .attention import tile_attention, tile_attention_refuses
from .attention_backward import tile_attention_backward, tile_attention_backward_refuses
from .fuse import (
    blend_tiles,
    blend_tiles_backward,
    blend_tiles_backward_refuses,
    blend_tiles_refuses,
    fuse_tiles,
    fuse_tiles_backward,
    fuse_tiles_backward_refuses,
    fuse_tiles_refuses,
)

__all__ = [
    "blend_tiles",
    "blend_tiles_backward",
    "blend_tiles_backward_refuses",
    "blend_tiles_refuses",
    "fuse_tiles",
    "fuse_tiles_backward",
    "fuse_tiles_backward_refuses",
    "fuse_tiles_refuses",
    "tile_attention",
    "tile_attention_backward",
    "tile_attention_backward_refuses",
    "tile_attention_refuses",
]
