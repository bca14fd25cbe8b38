"""`MediaDecoder`: decodes in worker processes that can be killed, a few of them, started when first needed."""

from __future__ import annotations

import io
import logging
import mmap
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kvkeye.errors import CapacityError, ConfigError
from kvkeye.media.decode.decoder import IN_PROCESS
from kvkeye.media.decode.picture import Alpha
from kvkeye.media.decode.process import Task, Worker
from kvkeye.media.decode.wire import shared_memory
from kvkeye.media.frame import Clip, Frame, ShorterThanCounted, check_dimensions
from kvkeye.media.limits import MediaLimits

log = logging.getLogger("kvkeye.media")

MAX_WORKERS = 4  # unless asked for more
MAX_WORKER_MEMORY = 2 << 30  # bytes of address space
MAX_JOBS = 256  # of one worker; then a fresh one takes over, because codecs leak
RING_BYTES, RING_SLOTS = 32 << 20, 4  # frames of a clip on their way; at least 2
_MAX_FRAMES = 1 << 31


def why_unsupported() -> str | None:
    """What this platform lacks for worker processes, in words; None where they run."""
    missing = [name for name, where in (("memfd_create", os), ("send_fds", socket)) if not hasattr(where, name)]
    return f"this platform has no {' and no '.join(missing)}" if missing else None


class MediaDecoder:
    """Decodes files of strangers. Safe to use from several threads; each item takes one worker.

    A worker that crashes, stalls or is killed costs its item a `MediaError`; the next item gets a fresh one. `close`,
    the end of a `with` block, or the end of this process ends all of them.
    """

    def __init__(self, num_workers: int | None = None, max_worker_memory: int = MAX_WORKER_MEMORY) -> None:
        """
        Args     num_workers        processes at most; 0 decodes in this process. Default: a core each, at most 4
                 max_worker_memory  bytes of address space of one worker
        Raises   ConfigError where workers are asked for and the platform has none
        """
        reason = why_unsupported()
        if num_workers is None:
            num_workers = 0 if reason else min(os.cpu_count() or 1, MAX_WORKERS)
            if reason:
                log.warning("media: files are decoded in this process: %s", reason)
        if num_workers < 0 or (num_workers and reason):
            raise ConfigError(
                f"media_workers={num_workers}; required is 0 or more{', and 0 because ' + reason if reason else ''}. "
                "Set it to 0 to decode in this process."
            )
        self.num_workers, self.max_worker_memory = num_workers, max_worker_memory
        self._changed = threading.Condition()
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        self._num_starting = 0
        self._is_closed = False
        self._pid = os.getpid()
        self._finalize = weakref.finalize(self, _end, self._workers, self._pid)

    def __enter__(self) -> MediaDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers, busy ones too. May be called again."""
        with self._changed:
            self._is_closed = True
            self._idle.clear()
            self._changed.notify_all()
        self._finalize()

    def picture(self, file: BinaryIO, limits: MediaLimits, where: str, alpha: Alpha, apply_orientation: bool) -> Frame:
        """See `Decoder`."""
        if not self.num_workers:
            return IN_PROCESS.picture(file, limits, where, alpha, apply_orientation)
        with self._task(limits, where) as task, _handle(file) as handle:
            request = {"kind": "image", "alpha": alpha, "apply_orientation": apply_orientation}
            task.send(request | {"where": where, "limits": asdict(limits)}, [handle])
            height, width = _sides(task, task.receive(), limits)
            with _shared(1, height, width) as (memory, pixels):
                task.send({}, [memory])
                task.receive()
                frame: Frame = pixels[0].copy()
                return frame

    def video(self, file: BinaryIO, limits: MediaLimits, where: str) -> AbstractContextManager[Clip]:
        """See `Decoder`. The worker belongs to the clip until the context ends."""
        return self._video(file, limits, where) if self.num_workers else IN_PROCESS.video(file, limits, where)

    @contextmanager
    def _video(self, file: BinaryIO, limits: MediaLimits, where: str) -> Iterator[Clip]:
        with self._task(limits, where) as task, _handle(file) as handle:
            task.send({"kind": "video", "where": where, "limits": asdict(limits)}, [handle])
            try:
                yield RemoteVideo(task)
            finally:
                if not task.is_over and not task.is_streaming:
                    task.send({"close": True})
                    task.receive()

    @contextmanager
    def _task(self, limits: MediaLimits, where: str) -> Iterator[Task]:
        """A worker for one item; it takes another one if it came to the end of this one."""
        worker = self._take()
        task = Task(worker, limits, where)
        try:
            yield task
        finally:
            self._give_back(worker, task.is_over and worker.num_jobs < MAX_JOBS)

    def _take(self) -> Worker:
        with self._changed:
            if os.getpid() != self._pid:  # a fork: the workers are the parent's
                self._idle, self._workers, self._num_starting, self._pid = [], set(), 0, os.getpid()
                self._finalize = weakref.finalize(self, _end, self._workers, self._pid)
            while True:
                self._check_open()
                while self._idle:
                    worker = self._idle.pop()
                    if worker.is_running:
                        return worker
                    worker.kill()
                    self._workers.discard(worker)
                if len(self._workers) + self._num_starting < self.num_workers:
                    self._num_starting += 1
                    break
                self._changed.wait()
        return self._start()

    def _start(self) -> Worker:
        worker = None
        try:
            worker = Worker(self.max_worker_memory)
        finally:
            with self._changed:
                self._num_starting -= 1
                if worker is not None:
                    self._workers.add(worker)
                self._changed.notify_all()
        if self._is_closed:
            self._give_back(worker, False)
        self._check_open()
        return worker

    def _give_back(self, worker: Worker, is_usable: bool) -> None:
        if not is_usable or self._is_closed:
            worker.kill()
        with self._changed:
            if is_usable and not self._is_closed:
                self._idle.append(worker)
            else:
                self._workers.discard(worker)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._is_closed:
            raise CapacityError("media: the decoder is closed; build a new one.")


class RemoteVideo:
    """A clip in the hands of a worker; see `Clip`. At most a ring of frames is in memory."""

    def __init__(self, task: Task) -> None:
        about = task.receive()
        self.task = task
        self.height, self.width = _sides(task, about, task.limits)
        self.num_frames = task.number(about, "num_frames", _MAX_FRAMES)
        self.fps = task.rate(about)
        self.ring: npt.NDArray[np.uint8] | None = None

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `Clip`: each frame lies in the ring and is overwritten after the next one is asked for."""
        task = self.task
        task.is_streaming = True
        ring = self._send(list(indices))
        for _ in range(len(indices) + 1):
            message = task.receive()
            if "frame" not in message:
                break
            slot = task.number(message, "frame", len(ring) - 1)
            yield ring[slot]
            task.send({"free": slot})
        task.is_streaming = False
        if "shorter" in message:
            raise ShorterThanCounted(task.number(message, "shorter", self.num_frames))

    def _send(self, indices: list[int]) -> npt.NDArray[np.uint8]:
        """Asks for frames; with the first request the worker gets the ring."""
        if self.ring is not None:
            self.task.send({"frames": indices})
            return self.ring
        slots = min(max(RING_BYTES // (self.height * self.width * 3), 2), RING_SLOTS)
        with _shared(slots, self.height, self.width) as (memory, self.ring):
            self.task.send({"frames": indices, "slots": slots}, [memory])
        return self.ring


def _sides(task: Task, message: dict[str, Any], limits: MediaLimits) -> tuple[int, int]:
    """Sides of what was decoded, checked again on this side before memory is taken."""
    height, width = (task.number(message, name, limits.max_side) for name in ("height", "width"))
    check_dimensions(height, width, limits, task.where)
    return height, width


@contextmanager
def _handle(file: BinaryIO) -> Iterator[int]:
    """An open file that a worker can read: the file itself, or a copy in memory of what is only here."""
    if not isinstance(file, io.BytesIO):
        yield file.fileno()
        return
    with os.fdopen(os.memfd_create("kvkeye-file", os.MFD_CLOEXEC), "w+b", buffering=0) as copy:
        data = memoryview(file.getvalue())  # getbuffer() would copy what the stream shares with its source
        while data:
            data = data[copy.write(data) :]
        copy.seek(0)
        yield copy.fileno()


@contextmanager
def _shared(slots: int, height: int, width: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """A file in memory and its pixels [slots, H, W, 3]; the map outlives the file's handle."""
    size = slots * height * width * 3
    memory = shared_memory(size)
    try:
        yield memory, np.frombuffer(mmap.mmap(memory, size), np.uint8).reshape(slots, height, width, 3)
    finally:
        os.close(memory)


def _end(workers: set[Worker], pid: int) -> None:
    """Ends all workers of this process; a forked child leaves its parent's alone."""
    if os.getpid() == pid:
        for worker in list(workers):
            worker.kill()
