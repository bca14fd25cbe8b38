"""Tokens to text, piece by piece: nothing is shown that a later token could still change.

Knows a decode function and stop strings; must not know requests or tags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# A character has at most four bytes. Longer undecodable runs are noise and are let go.
MAX_PENDING = 16


class Detokenizer:
    """Turns token ids into text deltas whose sum is the text of all ids.

    A piece that ends in an incomplete UTF-8 sequence waits for the next token. Text is decoded with the ids before it
    as context, since decoders treat the first token specially.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # where the window of context begins
        self._done = 0  # ids before this have been given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        delta = self._pending_text()
        num_pending = len(self._ids) - self._done
        if not delta or (delta.endswith(REPLACEMENT) and num_pending < MAX_PENDING):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return delta

    def flush(self) -> str:
        """What is still held back; the answer has ended."""
        delta = self._pending_text()
        self._context = self._done = len(self._ids)
        return delta

    def _pending_text(self) -> str:
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]


class StopStrings:
    """Cuts a stream at the first stop string, and holds back an end that could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, delta: str) -> str:
        """Text that is safe to show. Once `matched` is set there is no more."""
        if not self._stops:
            return delta
        if self.matched is not None:
            return ""
        text = self._held + delta
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            index, self.matched = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:index]
        num_safe = len(text) - self._num_held(text)
        self._held = text[num_safe:]
        return text[:num_safe]

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held
