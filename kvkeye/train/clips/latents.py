"""Clips as the pipelines' latents, encoded once and drawn from many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvkeye.train.clips.models import RATIO
from kvkeye.train.clips.motion import Motion

_PART = 32  # clips encoded at once
Clips = Callable[[int, int], tuple[list[Motion], Tensor]]  # (step, count) -> motions, clips


@dataclass(frozen=True)
class Pool:
    """Motions, their latents [N, z, T, h, w], and the latents of their first frames as guides."""

    motions: list[Motion]
    latents: Tensor
    guides: Tensor

    def draw(self, count: int, draws: torch.Generator) -> tuple[list[Motion], Tensor, Tensor]:
        """`count` of them: motions, latents, conditions [count, 4 + z, T, h, w] of their guides."""
        chosen = torch.randint(len(self.motions), (count,), generator=draws)
        return [self.motions[i] for i in chosen.tolist()], self.latents[chosen], with_mask(self.guides[chosen])


def fill(vae: Any, clips: Clips, size: int) -> Pool:
    """Encodes `size` clips."""
    motions: list[Motion] = []
    latents, guides = [], []
    for step in range(-(-size // _PART)):
        names, part = clips(step, min(_PART, size - len(motions)))
        motions += names
        latents.append(encode(vae, part))
        guides.append(encode(vae, guide_clips(part)))
    return Pool(motions, torch.cat(latents), torch.cat(guides))


@torch.no_grad()
def encode(vae: Any, clips: Tensor) -> Tensor:
    """Normalised latents [B, z, T, h, w] of clips [B, 3, F, H, W] in [-1, 1], as the pipelines have them."""
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    latents: Tensor = (vae.encode(clips).latent_dist.mode() - mean) / std
    return latents


def splice(vae: Any, clips: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips [B, 3, F, H, W] and raw latents of them, two times in three joined of two at a random place.

    A causal encoder may leave out of a latent what those before it say, and a long clip made of short ones then
    forgets. Joined to another clip's beginning, each latent must say it all. What follows the joint was encoded with
    its clip or, as tiles are, from there on.
    """
    kind, shift, place = (int(torch.randint(size, (), generator=draws)) for size in (3, 2, 1 << 30))
    latents = vae.encode(clips).latent_dist.mode()
    if kind == 0:
        return clips, latents
    # The first latent of the second part: an encoder takes 4 n + 1 frames.
    at = 1 + place % (latents.shape[2] - 1) if kind == 1 else 2 + 2 * (place % (latents.shape[2] // 2))
    frame = RATIO * at - 1
    tail = latents[:, :, at:] if kind == 1 else vae.encode(clips[:, :, frame + 1 :]).latent_dist.mode()
    head, seen = latents.roll(shift, 0)[:, :, :at], clips.roll(shift, 0)[:, :, :frame]
    return torch.cat([seen, clips[:, :, frame:]], 2), torch.cat([head, tail], 2)


def guide_clips(clips: Tensor) -> Tensor:
    """The first frame, then mid grey, as `WanImageToVideoPipeline` encodes a guide."""
    return torch.cat([clips[:, :, :1], torch.zeros_like(clips[:, :, 1:])], 2)


def with_mask(guides: Tensor) -> Tensor:
    """Mask and latents [B, 4 + z, T, h, w] of a guide: what the image-to-video denoiser sees beside the noise."""
    mask = torch.zeros(len(guides), RATIO, *guides.shape[2:])
    mask[:, :, 0] = 1
    return torch.cat([mask, guides], 1)
