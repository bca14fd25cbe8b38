"""Which media embeddings exist, who needs them, and which are kept for later requests. Plain numbers; no tensors.

Embeddings are named by content, so that one picture in several requests is encoded once, also when they arrive
together. Those in use always stay; their tokens are part of running prompts, so the KV cache bounds them. Those that
nobody needs any more stay within `max_idle_tokens`, the least recently used first to go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvkeye.engine.request import MediaSpan, Sequence


@dataclass(eq=False)
class _Entry:
    num_tokens: int
    is_ready: bool = False
    users: set[int] = field(default_factory=set)


class EncoderCache:
    """Names of embeddings with their users. An entry is planned by a step, ready after it, idle without users."""

    def __init__(self, max_idle_tokens: int) -> None:
        self.max_idle_tokens = max_idle_tokens
        self.num_hits = 0
        self.num_misses = 0
        self._entries: dict[bytes, _Entry] = {}
        self.num_idle_tokens = 0
        self._idle: OrderedDict[bytes, int] = OrderedDict()  # tokens, in order of use
        self._dropped: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: bytes) -> bool:
        # What has been dropped but not taken is still there.
        return name in self._entries or name in self._dropped

    def keep(self, seq: Sequence, span: MediaSpan) -> None:
        """Holds a span's embeddings for a row; new ones count as planned."""
        if span.embeds in self:
            self.num_hits += 1
            self.num_idle_tokens -= self._idle.pop(span.embeds, 0)
        else:
            self.num_misses += 1
        entry = self._entries.get(span.embeds)
        if entry is None:
            entry = self._entries[span.embeds] = _Entry(span.length, is_ready=span.embeds in self._dropped)
            self._dropped.discard(span.embeds)
        entry.users.add(seq.seq_id)
        seq.embeds.add(span.embeds)

    def release(self, seq: Sequence, names: Iterable[bytes]) -> None:
        """The row needs these no more."""
        for name in sorted(names):  # the order of a set is not the same in every process
            seq.embeds.remove(name)
            entry = self._entries[name]
            entry.users.remove(seq.seq_id)
            self._rest(name, entry)
        self._shrink()

    def finish(self, names: Iterable[bytes]) -> None:
        """What was planned exists now."""
        for name in names:
            entry = self._entries[name]
            entry.is_ready = True
            self._rest(name, entry)
        self._shrink()

    def forget(self, names: Iterable[bytes]) -> None:
        """What was planned will not exist; nobody holds it any more."""
        for name in names:
            del self._entries[name]

    def _rest(self, name: bytes, entry: _Entry) -> None:
        if entry.is_ready and not entry.users:
            self._idle[name] = entry.num_tokens
            self.num_idle_tokens += entry.num_tokens

    def _shrink(self) -> None:
        while self.num_idle_tokens > self.max_idle_tokens:
            name, num_tokens = self._idle.popitem(last=False)
            self.num_idle_tokens -= num_tokens
            del self._entries[name]
            self._dropped.add(name)

    def take_dropped(self) -> set[bytes]:
        """Names of embeddings that have gone since the last call: their memory can be freed."""
        dropped, self._dropped = self._dropped, set()
        return dropped

    def check(self, sequences: Iterable[Sequence]) -> None:
        """RuntimeError unless users, idle entries and the limit agree exactly."""
        users: dict[bytes, set[int]] = {}
        for seq in sequences:
            for name in seq.embeds:
                users.setdefault(name, set()).add(seq.seq_id)
        if users.keys() - self._entries.keys():
            raise RuntimeError("a row holds embeddings that do not exist")
        for name, entry in self._entries.items():
            if entry.users != users.get(name, set()):
                raise RuntimeError(f"embeddings held by rows {users.get(name)} are booked on {entry.users}")
            if entry.is_ready and (name in self._idle) == bool(entry.users):
                raise RuntimeError("embeddings in use are booked as idle, or idle ones as used")
        if self._idle.keys() - self._entries.keys() or self.num_idle_tokens != sum(self._idle.values()):
            raise RuntimeError("idle embeddings are not booked, or miscounted")
        if self.num_idle_tokens > self.max_idle_tokens:
            raise RuntimeError("more idle embeddings are kept than allowed")
        if self._dropped & self._entries.keys():
            raise RuntimeError("embeddings are booked that have been dropped")
