"""Frames to an MP4 file as they come, through PyAV. The file appears under its name only when it is whole."""

from __future__ import annotations

import errno
import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from torch import Tensor

from kvkeye.errors import CapacityError, ConfigError

CODECS = ("libx264", "libopenh264", "mpeg4")


class VideoWriter:
    """Writes frames of one size. Equal frames give equal bytes: one thread, no time stamps of the day.

    Raises   ConfigError: no encoder, or frames of another size;  CapacityError: the disk is full
    """

    def __init__(self, path: Path, fps: float, height: int, width: int, crf: int = 18) -> None:
        self.path, self.height, self.width = path, height, width
        self.num_frames = 0
        self._partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._partial), "w", format="mp4")
        codec = next((name for name in CODECS if name in av.codecs_available), None)
        if codec is None:
            raise ConfigError(
                f"{path}: PyAV has none of the encoders {', '.join(CODECS)}. Install another build of av."
            )
        stream: Any = self._container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        self._stream: Any = stream
        self._stream.height = height
        self._stream.width = width
        self._stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        self._stream.codec_context.thread_count = 1
        if codec == "libx264":
            # The tree of references reads past small pictures: equal frames would give unequal bytes.
            self._stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}

    def write(self, frames: Tensor) -> None:
        """Appends [n, 3, H, W] in [0, 1]."""
        if frames.shape[1:] != (3, self.height, self.width):
            raise ConfigError(
                f"{self.path}: frames of {tuple(frames.shape[1:])}; the file was begun with "
                f"(3, {self.height}, {self.width})."
            )
        pixels = (frames * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._mux(self._stream.encode(frame))
            self.num_frames += 1

    def _mux(self, packets: Any) -> None:
        try:
            self._container.mux(packets)
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> Exception:
        if error.errno != errno.ENOSPC:
            return error
        return CapacityError(
            f"{self.path}: the disk is full after {self.num_frames} frames. The latents are saved; make room and run "
            "the same command with --resume."
        )

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._mux(self._stream.encode(None))
            self._container.close()
            if kind is None:
                os.replace(self._partial, self.path)
        except OSError as failed:
            if kind is None:
                raise self._full(failed) from failed
        finally:
            self._partial.unlink(missing_ok=True)
