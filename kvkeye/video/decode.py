"""Latents to frames, a few at a time: memory does not grow with the length of the clip.

Wan, CogVideoX: the VAE is causal and carries its own state from piece to piece; HunyuanVideo: tiles in time, as its VAE
decodes any long clip. Each gives the bits of the pipeline's own decoding. Other VAEs (LTX, SVD) decode inside their
pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError


@torch.no_grad()
def stream_frames(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    """Yields the frames of one clip in order.

    Args     latents as the pipeline returns them with output_type="latent", a batch of one
    Returns  pieces [n, 3, H, W] fp32 on the CPU, in [0, 1]
    Raises   ConfigError where `is_streaming` is false
    """
    vae = pipe.vae
    if hasattr(vae, "_hf_hook") and hasattr(vae._hf_hook, "pre_forward"):
        vae._hf_hook.pre_forward(vae)  # offloaded models come back here
    pieces = _pieces_of(pipe)
    if pieces is None:
        raise ConfigError(f"decode: a {type(vae).__name__} decodes whole clips. Let the pipeline decode them.")
    for piece in pieces(pipe, latents.to(vae.device, vae.dtype)):
        frames: Tensor = pipe.video_processor.postprocess(piece[0].transpose(0, 1), output_type="pt")
        yield frames.float().cpu()


def is_streaming(pipe: Any) -> bool:
    """Whether decoding this pipeline's latents takes constant memory."""
    return _pieces_of(pipe) is not None


def _pieces_of(pipe: Any) -> Callable[[Any, Tensor], Iterator[Tensor]] | None:
    vae = pipe.vae
    by_class = {
        "AutoencoderKLWan": _wan,
        "AutoencoderKLCogVideoX": _cogvideox,
        "AutoencoderKLHunyuanVideo": _hunyuan,
    }
    for kind in type(vae).__mro__:
        if kind.__name__ in by_class and not (vae.use_tiling and kind.__name__ != "AutoencoderKLHunyuanVideo"):
            return by_class[kind.__name__]
    return None


def _wan(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    vae, config = pipe.vae, pipe.vae.config
    mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1).to(latents)
    inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1).to(latents)
    vae.clear_cache()
    x = vae.post_quant_conv(latents / inverse_std + mean)
    try:
        for i in range(x.shape[2]):
            vae._conv_idx = [0]
            first = {"first_chunk": True} if i == 0 else {}
            out = vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first)
            yield torch.clamp(_unpatchified(out, config.patch_size), min=-1.0, max=1.0)
    finally:
        vae.clear_cache()


def _unpatchified(x: Tensor, patch: int | None) -> Tensor:
    if patch is None:
        return x
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    spread: Tensor = unpatchify(x, patch_size=patch)
    return spread


def _cogvideox(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    vae, size = pipe.vae, pipe.vae.num_latent_frames_batch_size
    z = 1 / pipe.vae_scaling_factor_image * latents.permute(0, 2, 1, 3, 4)
    num_frames, cache = z.shape[2], None
    first = min(num_frames, size + num_frames % size)
    for begin, end in [(0, first), *((i, i + size) for i in range(first, num_frames, size))]:
        part = z[:, :, begin:end]
        if vae.post_quant_conv is not None:
            part = vae.post_quant_conv(part)
        out, cache = vae.decoder(part, conv_cache=cache)
        yield out


def _hunyuan(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    vae = pipe.vae
    z = latents / vae.config.scaling_factor
    ratio = vae.temporal_compression_ratio
    length, hop = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
    if not vae.use_framewise_decoding or z.shape[2] <= length:
        yield vae.decode(z).sample
        return
    blend = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
    left, before = (z.shape[2] - 1) * ratio + 1, None
    for begin in range(0, z.shape[2], hop):
        own = vae.use_framewise_decoding
        vae.use_framewise_decoding = False  # one tile of it, spatial tiles included
        try:
            tile = vae.decode(z[:, :, begin : begin + length + 1]).sample
        finally:
            vae.use_framewise_decoding = own
        if before is not None:
            tile = vae.blend_t(before, tile[:, :, 1:], blend)
        keep = vae.tile_sample_stride_num_frames + (before is None)
        before = tile
        if left > 0:
            yield tile[:, :, : min(keep, left)]
        left -= min(keep, tile.shape[2])
