"""Settings of the two methods, checked when built. Knows no tensors.

Lengths are latent frames throughout: a pixel clip of 4 (T - 1) + 1 frames has T of them under a causal 4x VAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvkeye.errors import ConfigError

if TYPE_CHECKING:
    from kvkeye.video.progress import TileProgress

WINDOWS = ("sine", "pyramid", "hann", "flat", "overlap-linear")
SCHEDULES = ("static", "shifted", "looped")
MODES = ("latent", "attention")
NOISES = ("videomerge", "freenoise", "random")
PROMPT_BLENDS = ("nearest", "linear")
SEARCHES = ("truncated", "coarse")


@dataclass(frozen=True)
class VideoMergeConfig:
    """How one denoiser is run over a clip longer than it was trained for.

    tile             latent frames per tile; None: the model's own length
    overlap          latent frames that neighbours share; None: three quarters of the tile, as published
    window           weights inside a tile: sine, pyramid, hann, flat, overlap-linear
    schedule         static; shifted: borders move with every denoising step; looped: also across the clip's end
    anchor           put the latent before a tile in front of it and drop its output: position 0 of a causal VAE's clip
                     is one pixel frame and looks like a cut
    mode             latent: the denoiser runs per tile and outputs are averaged; attention: it runs once, and
                     self-attention averages over tiles
    noise            videomerge: shuffled blocks with refreshed high frequencies; freenoise: shuffled blocks; random
    refresh          share of fresh high frequencies at the clip's end (w_max)
    spatial_cutoff, temporal_cutoff, order
                     of the Butterworth low-pass that splits the spectrum, as parts of the Nyquist frequency
    prompts          one per static tile, the first of which is also the pipeline's prompt; empty: the pipeline's
    prompt_blend     nearest: a tile takes the prompt of the nearest static tile; linear: it mixes the two nearest
    tile_batch       tiles per forward pass
    retain_image     tiles after the first keep the guide image's condition at their first position (image to video)
    on_tile          called with a `TileProgress` before every forward pass; returning False cancels the run
    """

    tile: int | None = None
    overlap: int | None = None
    window: str = "sine"
    schedule: str = "static"
    anchor: bool = False
    mode: str = "latent"
    noise: str = "videomerge"
    refresh: float = 0.1
    spatial_cutoff: float = 0.25
    temporal_cutoff: float = 0.25
    order: int = 4
    prompts: tuple[str, ...] = ()
    prompt_blend: str = "nearest"
    tile_batch: int = 1
    retain_image: bool = True
    on_tile: Callable[[TileProgress], bool | None] | None = None

    def __post_init__(self) -> None:
        where = "VideoMergeConfig"
        if self.tile is not None:
            _check_count(where, "tile", self.tile, low=2)
        if self.overlap is not None:
            _check_count(where, "overlap", self.overlap, low=0)
            if self.tile is not None and self.overlap >= self.tile:
                raise overlap_error(self.overlap, self.tile)
        _check_choice(where, "window", self.window, WINDOWS)
        _check_choice(where, "schedule", self.schedule, SCHEDULES)
        _check_choice(where, "mode", self.mode, MODES)
        _check_choice(where, "noise", self.noise, NOISES)
        _check_choice(where, "prompt_blend", self.prompt_blend, PROMPT_BLENDS)
        _check_count(where, "tile_batch", self.tile_batch, low=1)
        _check_count(where, "order", self.order, low=1)
        _check_share(where, "refresh", self.refresh)
        for name in ("spatial_cutoff", "temporal_cutoff"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{where}.{name}: got {getattr(self, name)!r}; expected a number above 0, at most 1.")
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ConfigError(f"{where}.prompts: got {self.prompts!r}; expected a sequence of strings, one per tile.")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.mode == "attention":
            for name, value in (("anchor", self.anchor), ("prompts", bool(self.prompts))):
                if value:
                    raise ConfigError(
                        f"{where}.{name}: attention mode runs the denoiser once over the whole clip, so there are no "
                        "tiles to treat apart. Use mode='latent'."
                    )

    def resolved_tile(self, native: int) -> int:
        """Latent frames of a tile, where `native` is the model's own length."""
        return self.tile or native

    def resolved_overlap(self, native: int) -> int:
        """Latent frames that neighbouring tiles share. Raises ConfigError where the overlap does not fit the tile."""
        tile = self.resolved_tile(native)
        overlap = 3 * tile // 4 if self.overlap is None else self.overlap
        if overlap >= tile:
            raise overlap_error(overlap, tile)
        return overlap


@dataclass(frozen=True)
class KStepConfig:
    """How initial noises are searched for each chunk of an image-to-video rollout.

    num_candidates   noises per chunk (N); 1: a plain rollout
    k                denoising steps per candidate before the choice
    search           truncated: the first k steps of the full schedule, kept by the winner; coarse: a k-step schedule of
                     its own, decoded and scored, after which the winner starts anew (as published)
    halving          truncated only: step counts at which the better half stays, e.g. (1, 2, 4); empty: all at k
    candidate_batch  candidates per forward pass
    drop_guide       leave out each later chunk's first frame, which repeats the frame before it
    color_anchor     pull of each chunk's latent statistics to the first chunk's, 0 to 1 (0.25 is usual)
    seed             of the generator from which all candidate seeds are drawn
    """

    num_candidates: int = 5
    k: int = 3
    search: str = "truncated"
    halving: tuple[int, ...] = ()
    candidate_batch: int = 1
    drop_guide: bool = True
    color_anchor: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        where = "KStepConfig"
        for name in ("num_candidates", "k", "candidate_batch"):
            _check_count(where, name, getattr(self, name), low=1)
        _check_choice(where, "search", self.search, SEARCHES)
        _check_share(where, "color_anchor", self.color_anchor)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"{where}.seed: got {self.seed!r}; expected an integer.")
        object.__setattr__(self, "halving", tuple(self.halving))
        if not self.halving:
            return
        if self.search == "coarse":
            raise ConfigError(f"{where}.halving: a coarse search restarts its winner. Use search='truncated'.")
        for count in self.halving:
            _check_count(where, "halving", count, low=1)
        if list(self.halving) != sorted(set(self.halving)):
            raise ConfigError(f"{where}.halving: got {self.halving!r}; expected ascending step counts, e.g. (1, 2, 4).")

    def rungs(self) -> list[tuple[int, int]]:
        """(step, candidates kept after it) of the truncated search, the last keeping one."""
        left, found = self.num_candidates, []
        for step in self.halving[:-1]:
            left = max(1, left // 2)
            found.append((step, left))
        return [*found, (self.halving[-1] if self.halving else self.k, 1)]


def overlap_error(overlap: int, tile: int) -> ConfigError:
    """The refusal of an overlap that leaves no hop."""
    return ConfigError(
        f"VideoMergeConfig.overlap: got {overlap} of a tile of {tile} latent frames; an overlap smaller than "
        "the tile is required. Lower overlap or raise tile."
    )


def _check_count(where: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{where}.{name}: got {value!r}; expected an integer of at least {low}.")


def _check_share(where: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{where}.{name}: got {value!r}; expected a number from 0 to 1.")


def _check_choice(where: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{where}.{name}: got {value!r}; expected one of {', '.join(known)}.")
