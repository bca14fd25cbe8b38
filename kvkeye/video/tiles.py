"""Which latent frames each tile covers at a denoising step, and with what weight. Pure arithmetic.

Every tile has the same length, so that one compiled graph and one cached plan serve all: the last tile is shifted back,
never shortened. Weights are normalised once, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.config import overlap_error


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one denoising step. `starts` ascend; with `looped`, frames count modulo `num_frames`."""

    num_frames: int
    tile: int
    overlap: int
    starts: tuple[int, ...]
    looped: bool = False

    @property
    def recompute(self) -> float:
        """Frames computed per frame of the clip (rho = J n / T)."""
        return len(self.starts) * self.tile / self.num_frames

    def frames(self) -> Tensor:
        """Frame numbers of each tile: int64 [J, n]."""
        return (torch.tensor(self.starts)[:, None] + torch.arange(self.tile)) % self.num_frames

    def centres(self) -> Tensor:
        """Middle of each tile in frames: fp64 [J]."""
        return torch.tensor(self.starts, dtype=torch.float64) + (self.tile - 1) / 2

    def weights(self, window: str) -> Tensor:
        """Share of each tile in each of its frames: fp64 [J, n], summing to 1 over the tiles of a frame."""
        raw = torch.stack([self._window(window, start) for start in self.starts])
        total = torch.zeros(self.num_frames, dtype=torch.float64)
        total.index_put_((self.frames(),), raw, accumulate=True)
        return raw / total[self.frames()]

    def _window(self, window: str, start: int) -> Tensor:
        if window != "overlap-linear":
            return window_weights(window, self.tile)
        weights = torch.ones(self.tile, dtype=torch.float64)
        ramp = torch.arange(1, self.overlap + 1, dtype=torch.float64) / (self.overlap + 1)
        if self.overlap and (self.looped or start > 0):
            weights[: self.overlap] = ramp
        if self.overlap and (self.looped or start + self.tile < self.num_frames):
            weights[-self.overlap :] = torch.minimum(weights[-self.overlap :], ramp.flip(0))
        return weights


def window_weights(name: str, tile: int) -> Tensor:
    """One window over `tile` frames, positive throughout: fp64 [n].

    sine sin(pi (i + 1/2) / n) (VideoMerge);  pyramid min(i + 1, n - i) (FreeNoise);  hann sin^2 of the sine's angle;
    flat 1 (Gen-L-Video).
    """
    at = torch.arange(tile, dtype=torch.float64)
    if name == "sine":
        return torch.sin(torch.pi * (at + 0.5) / tile)
    if name == "hann":
        return torch.sin(torch.pi * (at + 0.5) / tile).square()
    if name == "pyramid":
        return torch.minimum(at + 1, tile - at)
    if name == "flat":
        return torch.ones(tile, dtype=torch.float64)
    raise ConfigError(f"window: got {name!r}; expected sine, hann, pyramid, flat or overlap-linear.")


def plan_tiles(num_frames: int, tile: int, overlap: int, schedule: str = "static", step: int = 0) -> TilePlan:
    """Tiles of a clip at one denoising step.

    Args     all in latent frames;  schedule static | shifted | looped;  step of the denoising loop, from 0
    Returns  one tile of the whole clip where `tile` reaches it
    Raises   ConfigError where the overlap leaves no hop
    """
    if overlap >= tile:
        raise overlap_error(overlap, tile)
    if tile >= num_frames:
        return TilePlan(num_frames, num_frames, 0, (0,))
    hop, last = tile - overlap, num_frames - tile
    if schedule == "looped":
        offset = round(num_frames * _bit_reversed(step)) % num_frames
        starts = {(offset + start) % num_frames for start in range(0, num_frames, hop)}
        return TilePlan(num_frames, tile, overlap, tuple(sorted(starts)), looped=True)
    offset = round(hop * _bit_reversed(step)) % hop if schedule == "shifted" else 0
    return TilePlan(num_frames, tile, overlap, tuple(sorted({0, last, *range(offset, last, hop)})))


def num_static_tiles(num_frames: int, tile: int, overlap: int) -> int:
    """Tiles of a static plan, without making it."""
    return 1 + max(0, -(-(num_frames - tile) // (tile - overlap)))


def _bit_reversed(step: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: spreads the borders of successive steps far apart (van der Corput)."""
    found, part = 0.0, 0.5
    while step:
        found += part * (step & 1)
        step, part = step >> 1, part / 2
    return found
