"""A recipe of a draft head: one TOML file with `kind = "draft"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError
from kvkeye.train.recipe import Optimizer, build, read_toml
from kvkeye.utils.assets import folder_of


@dataclass(frozen=True)
class Head:
    """The head's own sizes; all others are the target's.

    feature_layers     the residual stream behind these target layers, ascending, is what the head sees
    intermediate_size  of its feed-forward part; 0: the target's
    draft_vocab_size   tokens it can propose, the most frequent ones of the answers; 0: all
    """

    feature_layers: tuple[int, ...]
    intermediate_size: int = 0
    draft_vocab_size: int = 0


@dataclass(frozen=True)
class Data:
    """Scenes whose questions the target answers: `scenes` in all, by kind, `images` of them in a step.

    tasks       questions per scene and task on average, where the scene admits it
    max_tokens  longer answers are left out
    """

    scenes: int
    kinds: dict[str, float]
    tasks: dict[str, float]
    images: int = 8
    max_tokens: int = 160


@dataclass(frozen=True)
class HeadRecipe:
    """Everything a run depends on.

    target  folder of a checkpoint, or the name of a bundled one
    depth   draft steps that are unrolled, each on the head's own states
    decay   weight of a draft step over the one before it
    """

    name: str
    output: Path
    target: Path
    steps: int
    data: Data
    head: Head
    kind: str = "draft"
    seed: int = 0
    depth: int = 5
    decay: float = 0.8
    optimizer: Optimizer = field(default_factory=Optimizer)
    backends: str = ""
    save_every: int = 200
    report_every: int = 20


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> HeadRecipe:
    """Reads a recipe. Raises ConfigError: an unknown, missing or mistyped entry, by name."""
    data = read_toml(path, overrides)
    parts: dict[str, Any] = {}
    for name, kind in (("head", Head), ("data", Data), ("optimizer", Optimizer)):
        parts[name] = build(kind, data.pop(name, {}), f"{path}: {name}")
    recipe: HeadRecipe = build(HeadRecipe, {**data, **parts}, str(path))
    if recipe.depth < 1 or recipe.steps < 1:
        raise ConfigError(f"recipe {path}: depth {recipe.depth}, steps {recipe.steps}; at least 1 each is required.")
    head = replace(recipe.head, feature_layers=tuple(recipe.head.feature_layers))
    return replace(recipe, output=Path(recipe.output), target=folder_of(recipe.target), head=head)
