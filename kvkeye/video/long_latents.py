"""The pipeline's own initial latents, rearranged for tiles: shapes and scaling stay the pipeline's business."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kvkeye.video.adapters import Adapter
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.noise import long_noise


def long_prepare_latents(pipe: Any, adapter: Adapter, config: VideoMergeConfig, module: Any) -> Callable[..., Any]:
    """`prepare_latents` whose fresh noise goes through `long_noise`; latents that the caller brings stay."""
    prepare = pipe.prepare_latents
    signature = inspect.signature(prepare)
    tile = config.resolved_tile(adapter.native(module))
    overlap = config.resolved_overlap(tile)

    def prepare_latents(*args: Any, **kwargs: Any) -> Any:
        returned = prepare(*args, **kwargs)
        bound = signature.bind(*args, **kwargs).arguments
        if bound.get("latents") is not None:
            return returned
        latents = returned[0] if isinstance(returned, tuple) else returned
        canonical = to_canonical(latents, pipe, adapter, bound)
        made = long_noise(canonical, tile, overlap, config, bound.get("generator"))
        if made is not canonical:
            latents = from_canonical(made, latents, adapter)
        return (latents, *returned[1:]) if isinstance(returned, tuple) else latents

    return prepare_latents


def to_canonical(latents: Tensor, pipe: Any, adapter: Adapter, bound: dict[str, Any]) -> Tensor:
    """Latents as [B, C, T, h, w]."""
    if adapter.frame_first:
        return latents.transpose(1, 2)
    if latents.ndim == 5:
        return latents
    h = bound["height"] // pipe.vae_spatial_compression_ratio // pipe.transformer_spatial_patch_size
    w = bound["width"] // pipe.vae_spatial_compression_ratio // pipe.transformer_spatial_patch_size
    tokens: Tensor = latents.unflatten(1, (-1, h, w))  # [B, T, h, w, C]
    return tokens.permute(0, 4, 1, 2, 3)


def from_canonical(made: Tensor, like: Tensor, adapter: Adapter) -> Tensor:
    """The inverse of `to_canonical`."""
    if adapter.frame_first:
        return made.transpose(1, 2).contiguous()
    return made if like.ndim == 5 else made.permute(0, 2, 3, 4, 1).flatten(1, 3).contiguous()
