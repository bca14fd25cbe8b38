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
    """The VAE's sizes and training: 4 times smaller in time and in both sides."""

    steps: int = 3000
    batch: int = 8
    base_dim: int = 16
    z_dim: int = 8
    kl: float = 1e-4
    lr: float = 2e-3


@dataclass(frozen=True)
class Denoiser:
    """A Wan transformer's sizes and training."""

    steps: int = 12000
    batch: int = 32
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    ffn: int = 384
    drop_prompt: float = 0.1
    shift: float = 3.0
    ema: float = 0.999


@dataclass(frozen=True)
class VideoRecipe:
    """Everything a run depends on. `num_frames` is one clip's, 4 n + 1; both pipelines share VAE and text encoder."""

    name: str
    output: Path
    kind: str = "video"
    seed: int = 0
    size: int = 32
    num_frames: int = 17
    fps: float = 8.0
    sampling_steps: int = 8
    text_dim: int = 64
    vae: Vae = field(default_factory=Vae)
    t2v: Denoiser = field(default_factory=Denoiser)
    i2v: Denoiser = field(default_factory=Denoiser)
    optimizer: Optimizer = field(default_factory=Optimizer)
    save_every: int = 200
    report_every: int = 50


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> VideoRecipe:
    """Reads a recipe. Raises ConfigError: an unknown, missing or mistyped entry, by name."""
    data = read_toml(path, overrides)
    parts: dict[str, Any] = {}
    for name, kind in (("vae", Vae), ("t2v", Denoiser), ("i2v", Denoiser), ("optimizer", Optimizer)):
        parts[name] = build(kind, data.pop(name, {}), f"{path}: {name}")
    recipe: VideoRecipe = build(VideoRecipe, {**data, **parts}, str(path))
    if recipe.num_frames % 4 != 1 or recipe.size % 16:
        raise ConfigError(
            f"recipe {path}: num_frames {recipe.num_frames}, size {recipe.size}; 4 n + 1 frames and a side that 16 "
            "divides are required."
        )
    return replace(recipe, output=Path(recipe.output))


STAGES = ("vae", "t2v", "i2v")


def stage_steps(recipe: VideoRecipe, stage: str) -> int:
    """Training steps of a stage."""
    assert stage in {f.name for f in fields(recipe)}
    return int(getattr(recipe, stage).steps)
