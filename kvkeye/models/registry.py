"""Model families by the architecture name in `config.json`. Modules are imported when a family is used."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError
from kvkeye.models.keye.config import ARCHITECTURES, read_json


@dataclass(frozen=True)
class Family:
    """Where the parts of a family live, as "module:name" below `kvkeye.models`."""

    model: str
    load_model: str
    check_folder: str
    processor: str

    def resolve(self, part: str) -> Any:
        """The class or function of `part`, a field of this class."""
        module, _, name = getattr(self, part).partition(":")
        return getattr(importlib.import_module(f"kvkeye.models.{module}"), name)


KEYE = Family(
    model="keye.model:KeyeModel",
    load_model="keye.weights:load_model",
    check_folder="keye.weights:check_folder",
    processor="keye.processor:KeyeProcessor",
)
FAMILIES: dict[str, Family] = dict.fromkeys(ARCHITECTURES, KEYE)


def family_of(folder: str | Path) -> Family:
    """The family of a checkpoint folder. Raises `ConfigError` that lists the known architectures."""
    path = Path(folder) / "config.json"
    names = read_json(path).get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ConfigError(
            f"{path}: architectures={names!r}; supported are {', '.join(FAMILIES)}. Use a checkpoint of one of these."
        )
    return family
