"""A training recipe: one TOML file with the seed, the model's sizes, the optimiser and the stages of the data."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from kvkeye.errors import ConfigError
from kvkeye.train.data import Mixture

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class Optimizer:
    """Update rule. The rate warms up linearly, stays, and falls as a cosine over the last `decay` steps.

    `muon_lr` above 0 gives weight matrices and filters of the hidden layers orthogonalised momentum with that rate; all
    other parameters take AdamW.
    """

    lr: float = 1.5e-3
    muon_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 1.0
    warmup: int = 200
    decay: int = 1000
    ema: float = 0.0


@dataclass(frozen=True)
class Stage:
    """From step `start` on: this mixture of data, and this weight of the patch loss.

    With `answers` false only the vision tower runs and learns, from the patch loss alone.
    """

    start: int
    mixture: Mixture
    patch_weight: float = 0.0
    answers: bool = True


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, and the folder it writes to."""

    name: str
    output: Path
    steps: int
    model: dict[str, Any]
    stages: tuple[Stage, ...]
    seed: int = 0
    processes: int = 1
    optimizer: Optimizer = field(default_factory=Optimizer)
    backends: str = ""
    save_every: int = 200
    report_every: int = 20
    evaluate_every: int = 200
    evaluate_questions: int = 64

    def stage(self, step: int) -> Stage:
        """The stage in force at `step`."""
        return [stage for stage in self.stages if stage.start <= step][-1]


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Reads a recipe. `overrides` maps dotted names ("steps", "optimizer.lr", "output") to values.

    Raises:
        ConfigError: an unknown, missing or mistyped entry, by name.
    """
    data = read_toml(path, overrides)
    if (kind := data.get("kind")) is not None:
        raise ConfigError(
            f"recipe {path}: kind is {kind!r}; recipes for chats have none, and `kvkeye train FILE` runs those of kind "
            "'draft' or 'video' too."
        )
    stages = tuple(_stage(entry, path) for entry in data.pop("stages", []))
    if not stages or stages[0].start != 0 or any(a.start >= b.start for a, b in itertools.pairwise(stages)):
        raise ConfigError(f"recipe {path}: [[stages]] must begin at start = 0 and ascend; correct their starts")
    optimizer = build(Optimizer, data.pop("optimizer", {}), f"{path}: optimizer")
    recipe = build(Recipe, {**data, "stages": stages, "optimizer": optimizer}, str(path))
    return replace(recipe, output=Path(recipe.output))


def read_toml(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's entries, with `overrides` by dotted names. Raises ConfigError where the file cannot be read."""
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path}: {error}; a readable TOML file is required; check the path") from error
    for name, value in (overrides or {}).items():
        target = data
        *parents, leaf = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return data


def _stage(entry: dict[str, Any], path: Path) -> Stage:
    names = {f.name for f in fields(Stage)}
    mixture = build(Mixture, {k: v for k, v in entry.items() if k not in names}, f"{path}: stages")
    return build(Stage, {**{k: v for k, v in entry.items() if k in names}, "mixture": mixture}, f"{path}: stages")


def build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A settings class from a table's entries. Raises ConfigError that names unknown and missing ones."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known.keys():
        raise ConfigError(
            f"recipe {where}: {', '.join(sorted(unknown))} unknown; known are {', '.join(known)}; correct the name"
        )
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"recipe {where}: {error}; add the missing entries") from error


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["steps=100", "optimizer.lr=1e-3"]` as overrides; a value that is no TOML value is a string."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"recipe: override {word!r}; name=value is required; add the value")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found
