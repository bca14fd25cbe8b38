"""The decoding worker: a process that imports no torch, gives up its rights, and decodes what it is sent.

It owns nothing: files come open, pixels go into memory that the other side has made, and it ends with its connection.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import os
import pkgutil
import socket
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.decode.picture import decode_picture
from kvkeye.media.decode.sandbox import filter_calls, limit_cpu, limit_process
from kvkeye.media.decode.video import MAX_THREADS, VideoFile
from kvkeye.media.decode.wire import Lost, Wire
from kvkeye.media.frame import Frame, ShorterThanCounted
from kvkeye.media.limits import MediaLimits

MAX_OPEN_FILES = 64
SPARE_SECONDS = 2.0  # of CPU time beyond the limit on decoding, so that the clearer error comes first

Message = dict[str, Any]
Ring = npt.NDArray[np.uint8]  # [slots, H, W, 3]


class _ToWire(logging.Handler):
    """What is logged here is logged on the other side."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(logging.INFO)
        self.wire = wire

    def emit(self, record: logging.LogRecord) -> None:
        self.wire.send({"log": record.getMessage()[:500]})


def main(handle: int) -> None:
    """Serves one connection until it ends."""
    wire = Wire(socket.socket(fileno=handle))
    start, _ = wire.receive()
    _import_everything()
    limit_process(int(start["max_memory"]), MAX_OPEN_FILES)
    wire.send({"ready": True, "is_filtered": filter_calls()})
    logger = logging.getLogger("kvkeye")
    logger.setLevel(logging.INFO)
    logger.addHandler(_ToWire(wire))
    inbox = _read_ahead(wire)
    while True:
        request, files = inbox.get()
        _Job(wire, inbox, request, files[0]).run()


def _import_everything() -> None:
    """What the two libraries import only when they need it: no file can be opened later."""
    Image.preinit()
    for name in ("JpegImagePlugin", "MpoImagePlugin", "PngImagePlugin", "TiffImagePlugin", "WebPImagePlugin"):
        importlib.import_module(f"PIL.{name}")
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(module.name)


def _read_ahead(wire: Wire) -> SimpleQueue[tuple[Message, list[int]]]:
    """Messages as they come. The process ends with the connection, even while it decodes."""
    inbox: SimpleQueue[tuple[Message, list[int]]] = SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(wire.receive(max_files=1))
        except Lost:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return inbox


@dataclass
class _Job:
    """One picture or one clip."""

    wire: Wire
    inbox: SimpleQueue[tuple[Message, list[int]]]
    request: Message
    handle: int

    def run(self) -> None:
        """Answers with pixels, or with the error that a person is to see."""
        limits = MediaLimits(**self.request["limits"])
        limit_cpu(limits.max_decode_seconds * MAX_THREADS + SPARE_SECONDS)
        try:
            with os.fdopen(self.handle, "rb") as file:
                if self.request["kind"] == "image":
                    self._picture(file, limits)
                else:
                    self._video(file, limits)
        except MediaError as error:
            self.wire.send({"error": str(error)})
        except Exception:
            self.wire.send({"log": traceback.format_exc()[-2000:]})
            raise

    def _picture(self, file: Any, limits: MediaLimits) -> None:
        request = self.request
        frame = decode_picture(file, limits, request["where"], request["alpha"], request["apply_orientation"])
        self.wire.send({"height": frame.shape[0], "width": frame.shape[1]})
        self._memory(1, *frame.shape[:2])[0] = frame
        self.wire.send({"end": True})

    def _video(self, file: Any, limits: MediaLimits) -> None:
        movie = VideoFile(file, limits, self.request["where"])
        about = {"num_frames": movie.num_frames, "fps": movie.fps, "height": movie.height, "width": movie.width}
        self.wire.send(about)
        ring: Ring | None = None
        while True:
            message, files = self.inbox.get()
            if "close" in message:
                self.wire.send({"end": True})
                return
            if ring is None:
                ring = _map(files[0], message["slots"], movie.height, movie.width)
            try:
                self._send_frames(movie.frames(message["frames"]), ring)
                self.wire.send({"sent": True})
            except ShorterThanCounted as shorter:
                self.wire.send({"shorter": shorter.num_frames})

    def _send_frames(self, frames: Iterator[Frame], ring: Ring) -> None:
        """Sends frames through free slots; all slots are free again afterwards."""
        free = deque(range(len(ring)))
        try:
            for frame in frames:
                if not free:
                    free.append(self.inbox.get()[0]["free"])
                slot = free.popleft()
                ring[slot] = frame
                self.wire.send({"frame": slot})
        finally:
            while len(free) < len(ring):
                free.append(self.inbox.get()[0]["free"])

    def _memory(self, slots: int, height: int, width: int) -> Ring:
        """The memory that the other side sends for pixels."""
        _, files = self.inbox.get()
        return _map(files[0], slots, height, width)


def _map(handle: int, slots: int, height: int, width: int) -> Ring:
    try:
        memory = mmap.mmap(handle, slots * height * width * 3)
    finally:
        os.close(handle)
    return np.frombuffer(memory, np.uint8).reshape(slots, height, width, 3)
