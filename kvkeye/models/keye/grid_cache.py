"""Tables that depend on a grid's size only, kept between forward passes within a byte limit.

Knows keys and tensors; must not know what a table means. Threads may share a cache: the worst a race costs is a table
computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class GridCache:
    """key -> tuple of tensors; the least recently used goes first. Tables above the limit are not kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._tables: dict[Hashable, tuple[Tensor, ...]] = {}  # in order of use

    def __len__(self) -> int:
        return len(self._tables)

    @property
    def num_bytes(self) -> int:
        return sum(map(_num_bytes, list(self._tables.values())))

    def get(self, key: Hashable, build: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The tables of `key`, built if they are not here. They carry no gradient and must not be changed."""
        tables = self._tables.pop(key, None)
        if tables is None:
            # Ordinary tensors, so that a backward pass may save what an inference pass has built.
            with torch.inference_mode(False), torch.no_grad():
                tables = build()
            self._make_room(_num_bytes(tables))
        if _num_bytes(tables) <= self.max_bytes:
            self._tables[key] = tables
        return tables

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            return
        kept = self.num_bytes
        for key, tables in list(self._tables.items()):
            if kept + num_bytes <= self.max_bytes:
                return
            self._tables.pop(key, None)
            kept -= _num_bytes(tables)

    def clear(self) -> None:
        self._tables.clear()

    def __reduce__(self) -> tuple[type[GridCache], tuple[int]]:
        """A copy, also that of a module which holds it, begins empty."""
        return GridCache, (self.max_bytes,)


def _num_bytes(tables: tuple[Tensor, ...]) -> int:
    return sum(table.nbytes for table in tables)
