"""kvkeye: a kernel-optimised inference engine for Keye-VL and for long video.

Importing this package imports neither torch nor a kernel, starts nothing and installs nothing:
public names are resolved at first use.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvkeye.engine import LLM, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
    from kvkeye.errors import KvkeyeError

_PUBLIC = {
    "AsyncEngine": "kvkeye.engine",
    "EngineConfig": "kvkeye.engine",
    "KvkeyeError": "kvkeye.errors",
    "LLM": "kvkeye.engine",
    "RequestOutput": "kvkeye.engine",
    "SamplingParams": "kvkeye.engine",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "EngineConfig",
    "KvkeyeError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

logging.getLogger("kvkeye").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvkeye' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
