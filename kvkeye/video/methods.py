"""The named ways to a long clip, each a set of settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvkeye.video.config import KStepConfig, VideoMergeConfig


@dataclass(frozen=True)
class Method:
    """What a name stands for. `merge` or `search` hold settings; with neither the pipeline runs as it is."""

    meaning: str
    merge: VideoMergeConfig | None = None
    search: KStepConfig | None = None

    @property
    def needs_image(self) -> bool:
        return self.search is not None


_MERGE = VideoMergeConfig()
METHODS = {
    "videomerge": Method("overlapping tiles fused in latent space, long noise (as published)", _MERGE),
    "shifted": Method("VideoMerge, little overlap, borders that move every step", replace(_MERGE, schedule="shifted")),
    "looped": Method("the same, also across the clip's end", replace(_MERGE, schedule="looped")),
    "attention": Method("VideoMerge's tiles inside self-attention (Wan)", replace(_MERGE, mode="attention")),
    "direct": Method("the model's own sampling at the full length"),
    "concat": Method("independent clips in a row", replace(_MERGE, overlap=0, noise="random", window="flat")),
    "freenoise": Method(
        "FreeNoise: shuffled noise, windows in self-attention (Wan)",
        replace(_MERGE, mode="attention", window="pyramid", noise="freenoise"),
    ),
    "genl": Method("Gen-L-Video: plain averages, half overlap", replace(_MERGE, noise="random", window="flat")),
    "kstep": Method("chunks that continue a picture, the best of several noises each", search=KStepConfig()),
    "chunks": Method("chunks that continue a picture, no search", search=KStepConfig(num_candidates=1)),
}
_OVERLAPS = {"shifted": 4, "looped": 4, "genl": 2}  # the tile's length over the overlap


def merge_config(name: str, native: int, **changes: Any) -> VideoMergeConfig | None:
    """A method's settings for a model of `native` latent frames, with the caller's changes; None for plain sampling.

    Raises ConfigError where they do not fit.
    """
    config = METHODS[name].merge
    if config is None:
        return None
    given = {key: value for key, value in changes.items() if value is not None}
    tile = given.get("tile") or native
    if name in _OVERLAPS:
        given.setdefault("overlap", tile // _OVERLAPS[name])
    return replace(config, **{"tile": tile, **given})


def search_config(name: str, **changes: Any) -> KStepConfig:
    """A rollout's settings with the caller's changes. Raises ConfigError."""
    config = METHODS[name].search
    assert config is not None, f"{name} is no rollout"
    return replace(config, **{key: value for key, value in changes.items() if value is not None})
