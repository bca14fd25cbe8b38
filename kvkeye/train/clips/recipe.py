"""A recipe of the tiny video pipelines: one TOML file with `kind = "video"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError
from kvkeye.train.recipe import Optimizer, build, read_toml


@dataclass(frozen=True)
class Vae:
    """The VAE's sizes and training: 2 times smaller in time, 4 times in both sides (2 of them as patches of pixels).

    Three of four steps see five frames, the fourth half as many clips of `num_frames`: it is causal, and cheaper steps
    are more steps.
    """

    steps: int = 1300
    batch: int = 8
    num_frames: int = 17
    base_dim: int = 16
    z_dim: int = 12
    noise: float = 0.05
    lr: float = 3e-3
    muon_lr: float = 8e-3
    decay: int = 500


@dataclass(frozen=True)
class Denoiser:
    """A Wan transformer's sizes and training. A `guided` share of the clips comes with its first frame, as in image to
    video; the others are text to video."""

    steps: int = 2500
    batch: int = 16
    lr: float = 1e-3
    muon_lr: float = 3e-3
    decay: int = 1500
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    drop_prompt: float = 0.1
    guided: float = 0.4
    shift: float = 3.0
    ema: float = 0.998


@dataclass(frozen=True)
class VideoRecipe:
    """Everything a run depends on. `num_frames` is one clip's, 4 n + 1; both pipelines come from one denoiser.

    Each of `processes` makes its own batches. `pool` clips are encoded once; the denoiser learns from their latents.
    """

    name: str
    output: Path
    kind: str = "video"
    seed: int = 0
    processes: int = 1
    pool: int = 6144
    size: int = 32
    num_frames: int = 9
    fps: float = 8.0
    sampling_steps: int = 8
    guidance: float = 3.0
    text_dim: int = 64
    vae: Vae = field(default_factory=Vae)
    denoiser: Denoiser = field(default_factory=Denoiser)
    optimizer: Optimizer = field(default_factory=Optimizer)
    save_every: int = 200
    report_every: int = 50


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> VideoRecipe:
    """Reads a recipe. Raises ConfigError: an unknown, missing or mistyped entry, by name."""
    data = read_toml(path, overrides)
    parts: dict[str, Any] = {}
    kinds = {"vae": Vae, "denoiser": Denoiser, "optimizer": Optimizer}
    for name, kind in kinds.items():
        parts[name] = build(kind, data.pop(name, {}), f"{path}: {name}")
    recipe: VideoRecipe = build(VideoRecipe, {**data, **parts}, str(path))
    if recipe.num_frames % 4 != 1 or recipe.size % 8:
        raise ConfigError(
            f"recipe {path}: num_frames {recipe.num_frames}, size {recipe.size}; 4 n + 1 frames and a side that 8 "
            "divides are required."
        )
    return replace(recipe, output=Path(recipe.output))


STAGES = ("vae", "denoiser")


def stage_steps(recipe: VideoRecipe, stage: str) -> int:
    """Training steps of a stage."""
    assert stage in {f.name for f in fields(recipe)}
    return int(getattr(recipe, stage).steps)
