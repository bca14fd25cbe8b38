"""Training through the same layers and ops that serve: scenes, data, losses, recipes, trainer.

`run(recipe, overrides)` trains on chats about scenes; `kvkeye train` trains any recipe from a shell.
"""

from __future__ import annotations

from typing import Any

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    if name != "run":
        raise AttributeError(f"module 'kvkeye.train' has no attribute {name!r}; public names: run")
    from kvkeye.train.trainer import run

    return run
