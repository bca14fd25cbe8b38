"""Embeddings of media seen before, by content key, within a byte limit; least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class EncoderCache:
    """key -> embeddings [tokens, hidden]. Items above the limit are not kept; those in use live on with their users."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._items: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: bytes) -> Tensor | None:
        embeds = self._items.get(key)
        if embeds is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._items.move_to_end(key)
        return embeds

    def put(self, key: bytes, embeds: Tensor) -> None:
        if embeds.nbytes > self.max_bytes or key in self._items:
            return
        self._items[key] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self.max_bytes:
            _, evicted = self._items.popitem(last=False)
            self.num_bytes -= evicted.nbytes

    def clear(self) -> None:
        self._items.clear()
        self.num_bytes = 0
