"""Keye-VL Preview and 1.5. Public names are resolved at first use, so that `config` costs no torch import."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeye.models.keye.config import KeyeConfig, TextConfig, VisionConfig
    from kvkeye.models.keye.model import KeyeModel
    from kvkeye.models.keye.parsing import OutputParser
    from kvkeye.models.keye.positions import MediaGrid
    from kvkeye.models.keye.processor import KeyeProcessor, MediaInput, ProcessedPrompt

_PUBLIC = {
    "KeyeConfig": "config",
    "KeyeModel": "model",
    "KeyeProcessor": "processor",
    "MediaGrid": "positions",
    "MediaInput": "processor",
    "OutputParser": "parsing",
    "ProcessedPrompt": "processor",
    "TextConfig": "config",
    "VisionConfig": "config",
}
__all__ = [
    "KeyeConfig",
    "KeyeModel",
    "KeyeProcessor",
    "MediaGrid",
    "MediaInput",
    "OutputParser",
    "ProcessedPrompt",
    "TextConfig",
    "VisionConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
