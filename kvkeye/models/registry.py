"""Architectures that can be built, by the name in `config.json`."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kvkeye.errors import ConfigError
from kvkeye.models.keye.config import ARCHITECTURES, KeyeConfig


def _keye(config: KeyeConfig) -> nn.Module:
    from kvkeye.models.keye.model import KeyeModel

    return KeyeModel(config)


MODELS: dict[str, Callable[[KeyeConfig], nn.Module]] = dict.fromkeys(ARCHITECTURES, _keye)


def model_class(architecture: str) -> Callable[[KeyeConfig], nn.Module]:
    """What builds a model of this architecture from its configuration.

    Raises ConfigError with the known names.
    """
    if architecture not in MODELS:
        raise ConfigError(
            f"model registry: architecture {architecture!r} is unknown; known are {', '.join(sorted(MODELS))}. "
            "Use a checkpoint of one of these."
        )
    return MODELS[architecture]
