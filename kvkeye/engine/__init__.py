"""The serving engine: requests, scheduling, paged KV cache, forward passes, sampling. See README.md.

Names are resolved at first use, so that scheduling can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeye.engine.async_engine import AsyncEngine
    from kvkeye.engine.config import EngineConfig, SpeculationConfig
    from kvkeye.engine.engine import Engine
    from kvkeye.engine.llm import LLM
    from kvkeye.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, SpeculationMetrics
    from kvkeye.engine.request import SamplingParams

_PUBLIC = {
    "AsyncEngine": "async_engine",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineConfig": "config",
    "LLM": "llm",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "SamplingParams": "request",
    "SpeculationConfig": "config",
    "SpeculationMetrics": "outputs",
}
__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SpeculationConfig",
    "SpeculationMetrics",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvkeye.engine' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"kvkeye.engine.{_PUBLIC[name]}"), name)
