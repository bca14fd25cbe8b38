"""A lock that a loop cannot keep for itself: whoever waits gets it before the loop takes it again."""

from __future__ import annotations

import threading
from types import TracebackType


class FairLock:
    """Used as a context manager. Not reentrant."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._held = threading.Lock()

    def __enter__(self) -> None:
        # One waiter at a time stands in the gate; the last owner has to queue behind it.
        with self._gate:
            self._held.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.release()
