"""One decoding worker seen from this side: starting it, talking to it within a time, killing it."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from kvkeye.errors import CapacityError, MediaError
from kvkeye.media.decode.wire import Lost, Wire
from kvkeye.media.limits import MediaLimits

log = logging.getLogger("kvkeye.media")

# Threads of a step wait for one another; one that shares its core with a decoder would hold up the rest at every turn.
NICE = 10
_BOOT = (
    f"import json, os, sys; os.nice({NICE}); sys.path[:] = json.loads(sys.argv[2]); "
    "from kvkeye.media.decode.worker import main; main(int(sys.argv[1]))"
)
START_SECONDS = 120.0
SPARE_SECONDS = 1.0  # beyond the limit on decoding: a worker that is well reports the limit itself
_KEPT = ("LD_LIBRARY_PATH", "PATH")  # of the environment; the rest may hold secrets and is no worker's business


class Worker:
    """A running worker. Used by one thread at a time."""

    def __init__(self, max_memory: int) -> None:
        """Starts the process and waits until it is ready. Raises `CapacityError`."""
        here, there = socket.socketpair()
        with there:
            arguments = [str(there.fileno()), json.dumps([os.path.abspath(path) for path in sys.path])]
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=_environment(),
            )
        self.wire = Wire(here)
        self.num_jobs = 0
        try:
            self.wire.send({"max_memory": max_memory})
            ready, _ = self.wire.receive(START_SECONDS)
        except (Lost, TimeoutError):
            raise CapacityError(
                f"media: a decoding process did not start ({self.kill()}); required is memory for a second Python "
                "process. Set media_workers=0 to decode in this one."
            ) from None
        if not ready.get("is_filtered"):
            log.warning("media: this kernel does not filter system calls; decoding processes run without the filter")

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> str:
        """Ends the process at once. Returns how it had ended, in words."""
        self.wire.close()
        try:
            code = self.process.wait(0.1)  # it may be about to end by itself, which says why
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code >= 0:
            return f"exit code {code}"
        names = {s.value: s.name for s in signal.Signals}
        return f"signal {names.get(-code, -code)}"


class Task:
    """One item in the hands of a worker, within the item's time.

    is_over       the worker has given its last answer and can take another item
    is_streaming  frames are on their way
    """

    def __init__(self, worker: Worker, limits: MediaLimits, where: str) -> None:
        self.worker, self.limits, self.where = worker, limits, where
        self.seconds_left = limits.max_decode_seconds + SPARE_SECONDS
        self.is_over = self.is_streaming = False
        worker.num_jobs += 1

    def send(self, message: dict[str, Any], files: Sequence[int] = ()) -> None:
        try:
            self.worker.wire.send(message, files)
        except Lost:
            raise self._lost() from None

    def receive(self) -> dict[str, Any]:
        """The next answer. Only the time spent waiting here counts. Raises `MediaError`."""
        while True:
            start = time.monotonic()
            try:
                message, _ = self.worker.wire.receive(max(self.seconds_left, 0.001))
            except TimeoutError:
                self.is_streaming = True  # and will not end
                raise self._too_slow() from None
            except Lost:
                raise self._lost() from None
            self.seconds_left -= time.monotonic() - start
            self.is_over = "error" in message or "end" in message
            if "error" in message:
                raise MediaError(str(message["error"]))
            if "log" not in message:
                return message
            log.info("%s", message["log"])

    def number(self, message: dict[str, Any], name: str, most: int) -> int:
        """A whole number 0..most of an answer; a worker in a stranger's hands could send anything."""
        value = message.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._lost()
        return value

    def rate(self, message: dict[str, Any]) -> float:
        value = message.get("fps")
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise self._lost()
        return value

    def _too_slow(self) -> MediaError:
        return MediaError(
            f"{self.where}: decoding took longer than {self.limits.max_decode_seconds:g} s. "
            "Send a shorter or smaller clip."
        )

    def _lost(self) -> MediaError:
        self.is_streaming = True  # and will not end
        end = self.worker.kill()
        log.warning("%s: the decoding process ended: %s", self.where, end)
        if end == "signal SIGXCPU":
            return self._too_slow()
        return MediaError(
            f"{self.where}: the decoding process ended ({end}) while it read this file; re-encode the file."
        )


def _environment() -> dict[str, str]:
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | one_thread
