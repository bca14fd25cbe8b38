"""What a person sees: text that is safe to print, stages that take long, answers as they come. Knows no model."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE = 1.0  # seconds that need no explanation
_REFRESH = 0.2
_DIM, _PLAIN = "\033[2m", "\033[0m"
# A model's answer must not move the cursor, change colours or set the window's title.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """The text without control characters."""
    return text.translate(_CONTROLS)


@contextmanager
def stage(label: str, patience: float = PATIENCE) -> Iterator[None]:
    """Says on stderr what is going on if it takes longer than `patience` seconds, and at the end how long it took.

    A terminal sees the seconds count; a file gets two lines.
    """
    start, done, shown = time.perf_counter(), threading.Event(), threading.Event()
    live = sys.stderr.isatty()

    def write(text: str) -> None:
        print(f"\r{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    def watch() -> None:
        if done.wait(patience):
            return
        shown.set()
        write(f"{label} ...")
        while live and not done.wait(_REFRESH):
            write(f"{label} ... {time.perf_counter() - start:.0f} s")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        if shown.is_set():
            write(f"{label}: {time.perf_counter() - start:.1f} s   ")
            if live:
                print(file=sys.stderr, flush=True)


class AnswerPrinter:
    """Prints an answer piece by piece: its text on stdout, the reasoning before it on stderr."""

    def __init__(self, out: TextIO | None = None, aside: TextIO | None = None) -> None:
        self._out, self._aside = out or sys.stdout, aside or sys.stderr
        self._is_reasoning = False
        self._ends_line = True

    def write(self, reasoning: str, text: str) -> None:
        if reasoning:
            self._write_reasoning(printable(reasoning))
        if text:
            self.end_reasoning()
            self._put(self._out, printable(text))

    def _write_reasoning(self, text: str) -> None:
        if not self._is_reasoning:
            self._is_reasoning = True
            text = (_DIM if self._aside.isatty() else "") + text
        self._put(self._aside, text)

    def end_reasoning(self) -> None:
        if self._is_reasoning:
            self._is_reasoning = False
            self._aside.write((_PLAIN if self._aside.isatty() else "") + ("" if self._ends_line else "\n"))
            self._aside.flush()
            self._ends_line = True

    def end(self) -> None:
        """Ends the last line."""
        self.end_reasoning()
        if not self._ends_line:
            self._put(self._out, "\n")

    def _put(self, stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()
        self._ends_line = text.endswith("\n")


def count(number: int, noun: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
