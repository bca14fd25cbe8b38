"""Initial noise of a long clip: blocks repeated in shuffled order, high frequencies refreshed more and more over time.

All randomness comes from the caller's generator (None: torch's own, as pipelines do), and time is the axis -3 of
[..., T, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.errors import ConfigError
from kvkeye.video.config import VideoMergeConfig

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"


def long_noise(noise: Tensor, tile: int, overlap: int, config: VideoMergeConfig, generator: Generators) -> Tensor:
    """Turns independent noise of a long clip into the noise that tiles agree on.

    Shapes     noise [B, C, T, h, w], standard normal
    Args       tile, overlap in latent frames;  generator one for all, or one per clip of the batch
    Returns    the same shape and dtype; `noise` itself where one tile holds the clip or config.noise is "random"
    Source     VideoMerge (arXiv 2503.09926), long noise initialisation; shuffling after FreeNoise (arXiv 2310.15169)
    """
    num_frames = noise.shape[-3]
    if config.noise == "random" or tile >= num_frames:
        return noise
    generators = _per_clip(generator, len(noise))
    if generators is None:  # one stream for the whole batch
        return _one_stream(noise, tile, overlap, config, generator)  # type: ignore[arg-type]
    clips = [_one_stream(clip[None], tile, overlap, config, own) for clip, own in zip(noise, generators)]
    return torch.cat(clips)


def _one_stream(
    noise: Tensor, tile: int, overlap: int, config: VideoMergeConfig, generator: torch.Generator | None
) -> Tensor:
    source = shuffled_sources(noise.shape[-3], tile, tile - overlap, generator)
    base = noise.index_select(-3, source.to(noise.device))
    if config.noise == "freenoise" or config.refresh == 0:
        return base
    device = noise.device if generator is None else generator.device
    fresh = torch.randn(noise.shape, generator=generator, device=device, dtype=torch.float32).to(noise.device)
    keep, gain = (weights.float().to(noise.device) for weights in refresh_weights(noise.shape[-3], config.refresh))
    refreshed: Tensor = ops.spectral_refresh(
        base, fresh.to(base.dtype), keep, gain, config.spatial_cutoff, config.temporal_cutoff, config.order
    )
    return refreshed


def shuffled_sources(num_frames: int, tile: int, hop: int, generator: torch.Generator | None) -> Tensor:
    """For each frame the frame whose noise it takes: int64 [T].

    The first `tile` frames are their own; every further block of `hop` frames is a permutation of the block one tile
    earlier, and a last block that is shorter takes part of one.
    """
    source = torch.arange(num_frames)
    own = _cpu_generator(generator)
    for first in range(tile, num_frames, hop):
        block = source[first - tile : first - tile + hop]
        order = torch.randperm(hop, generator=own)
        source[first : first + hop] = block[order][: num_frames - first]
    return source


def refresh_weights(num_frames: int, most: float) -> tuple[Tensor, Tensor]:
    """Amplitudes of the kept and of the fresh high frequencies over time: fp64 [T] each, squares summing to 1."""
    w = most * torch.linspace(0, 1, num_frames, dtype=torch.float64)
    norm = (w.square() + (1 - w).square()).sqrt()
    return (1 - w) / norm, w / norm


def _per_clip(generator: Generators, batch: int) -> list[torch.Generator] | None:
    if generator is None or isinstance(generator, torch.Generator):
        return None
    found = list(generator)
    if len(found) != batch:
        raise ConfigError(
            f"generator: got {len(found)} for a batch of {batch} clips; one per clip, or one, is required."
        )
    return found


def _cpu_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Permutations are drawn on the CPU; a GPU generator seeds one that lives there."""
    if generator is None or generator.device.type == "cpu":
        return generator
    seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))
