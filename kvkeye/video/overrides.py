"""Methods of one object replaced for a while, so that a pipeline's own code runs unchanged around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def replace_method(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Shadows `owner.name` on this object alone; returns what undoes it."""
    shadowed = vars(owner).get(name)
    # Past `nn.Module.__setattr__` and the pipelines' own.
    object.__setattr__(owner, name, method)

    def undo() -> None:
        if shadowed is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, shadowed)

    return undo


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """`replace_method` for the length of a block."""
    undo = replace_method(owner, name, method)
    try:
        yield
    finally:
        undo()
