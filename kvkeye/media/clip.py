"""A clip as numbered frames: an MP4, MKV or WebM file through PyAV, or a list of pictures.

Only the wanted frames are converted to RGB. The length is counted from packets, never believed from the header.
Knows nothing of models; which frames are wanted is decided in `sampling`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol, TypeAlias

import av
import numpy as np
import numpy.typing as npt
import torch

from kvkeye.errors import MediaError
from kvkeye.media.image import check_dimensions, load_image
from kvkeye.media.limits import MediaLimits
from kvkeye.media.resize import Frame

log = logging.getLogger("kvkeye.media")

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg")
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_EBML = b"\x1a\x45\xdf\xa3"


# A list of pictures, uint8 [F, H, W, 3], or uint8 [F, 3, H, W].
Frames: TypeAlias = "Sequence[object] | npt.NDArray[Any] | torch.Tensor"


class ShorterThanCounted(Exception):
    """Fewer frames came out than packets went in: `num_frames` is the true length."""

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.num_frames = num_frames


class Clip(Protocol):
    """Numbered frames. Sides in pixels after rotation; `fps` is None for a list whose clock is unknown."""

    num_frames: int
    height: int
    width: int

    @property
    def fps(self) -> float | None: ...

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yields uint8 [H, W, 3] for non-decreasing indices. May be called again."""
        ...


class FrameList:
    """Pictures given as a list, decoded one at a time; each may be anything that `load_image` takes."""

    def __init__(self, sources: Frames, fps: float | None, limits: MediaLimits, where: str) -> None:
        if isinstance(sources, (np.ndarray, torch.Tensor)) and sources.ndim != 4:
            raise MediaError(
                f"{where}: an array of shape {tuple(sources.shape)}; required is "
                "[F, H, W, 3] in numpy or [F, 3, H, W] in torch."
            )
        if len(sources) == 0:
            raise MediaError(f"{where}: a list of 0 frames; at least 1 is required.")
        if len(sources) > limits.max_frames:
            raise MediaError(
                f"{where}: a list of {len(sources)} frames; at most {limits.max_frames} are accepted. Send fewer."
            )
        self.sources, self.limits, self.where = sources, limits, where
        self.num_frames, self.fps = len(sources), fps
        first = self._load(0)
        self.height, self.width = first.shape[:2]

    def _load(self, index: int) -> Frame:
        return load_image(self.sources[index], self.limits, f"{self.where}: frame {index}")

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        for index in indices:
            frame = self._load(index)
            if frame.shape[:2] != (self.height, self.width):
                raise MediaError(
                    f"{self.where}: frame {index} has {frame.shape[1]}x{frame.shape[0]} pixels, frame 0 has "
                    f"{self.width}x{self.height}; all frames of a clip must share one size."
                )
            yield frame


class VideoFile:
    """A video stream in an open file. Raises `MediaError` for anything but the containers and codecs listed above."""

    def __init__(self, file: BinaryIO, limits: MediaLimits, where: str) -> None:
        self.file, self.limits, self.where = file, limits, where
        self.deadline = time.monotonic() + limits.max_decode_seconds
        self.format = _sniff(file, where)
        with self._stream() as (container, stream):
            self.fps = _frame_rate(stream, where)
            # Counting stops one past the limit on duration.
            most = int(limits.max_video_seconds * self.fps) + 1
            self.num_frames = self._count_packets(container, stream, most)
        if self.num_frames > limits.max_video_seconds * self.fps:
            raise MediaError(
                f"{where}: the clip is longer than {limits.max_video_seconds:g} s at {self.fps:.3g} frames per "
                "second. Cut it."
            )
        with self._stream() as (container, stream):
            first = next(self._decode(container, stream), None)
            if first is None:
                raise self._no_frames()
            self.quarter_turns = round(first.rotation / 90) % 4
            sides = (first.height, first.width)
        check_dimensions(*sides, limits, where)
        self.coded_size = sides
        self.height, self.width = sides[::-1] if self.quarter_turns % 2 else sides

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream, opened at the beginning with a forced demuxer."""
        self.file.seek(0)
        try:
            with av.open(self.file, format=self.format, metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise MediaError(f"{self.where}: the file holds no video stream; send one that does.")
                stream = container.streams.video[0]
                self._check_codec(stream)
                yield container, stream
        except av.FFmpegError as error:
            log.info("%s: %r", self.where, error)
            raise MediaError(f"{self.where}: the video is truncated or damaged; send the whole file.") from None

    def _check_codec(self, stream: Any) -> None:
        context = stream.codec_context
        name = context.codec.canonical_name if context is not None else "unknown"
        if name not in CODECS:
            raise MediaError(
                f"{self.where}: video codec {name!r}; accepted are {', '.join(CODECS)}. Re-encode the clip."
            )
        check_dimensions(context.height, context.width, self.limits, self.where)
        context.options = {"max_pixels": str(self.limits.max_image_pixels)}  # the bit stream may say otherwise
        stream.thread_type = "AUTO"

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise MediaError(
                f"{self.where}: decoding took longer than {self.limits.max_decode_seconds:g} s. "
                "Send a shorter or smaller clip."
            )

    def _count_packets(self, container: Any, stream: Any, most: int) -> int:
        count = 0
        for packet in container.demux(stream):
            if packet.size:
                count += 1
            if count >= most:
                break
            if count % 1024 == 0:
                self._check_deadline()
        if count == 0:
            raise self._no_frames()
        return count

    def _no_frames(self) -> MediaError:
        return MediaError(f"{self.where}: no frame could be decoded; the video is empty or damaged.")

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        for frame in container.decode(stream):
            self._check_deadline()
            yield frame

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yields uint8 [H, W, 3] for non-decreasing indices. Raises `ShorterThanCounted` at an early end."""
        wanted = iter(indices)
        target = next(wanted, None)
        count = 0
        with self._stream() as (container, stream):
            for frame in self._decode(container, stream):
                while target == count:
                    yield self._to_rgb(frame)
                    target = next(wanted, None)
                if target is None:
                    return
                count += 1
        if target is not None:
            if count == 0:
                raise self._no_frames()
            log.info("%s: %d packets gave %d frames", self.where, self.num_frames, count)
            raise ShorterThanCounted(count)

    def _to_rgb(self, frame: Any) -> Frame:
        if (frame.height, frame.width) != self.coded_size:
            raise MediaError(f"{self.where}: the picture size changes within the clip; re-encode it at one size.")
        rgb: Frame = frame.to_ndarray(format="rgb24")
        return np.rot90(rgb, self.quarter_turns) if self.quarter_turns else rgb


def _sniff(file: BinaryIO, where: str) -> str:
    """The demuxer to force: probing would let playlists and concatenation scripts open other files."""
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _MP4_BOXES:
        return "mov"
    if head[:4] == _EBML:
        return "matroska"
    raise MediaError(f"{where}: no MP4, MKV or WebM file; convert the clip, or send its frames as a list.")


def _frame_rate(stream: Any, where: str) -> float:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not 0 < float(rate) <= 1000:
        raise MediaError(
            f"{where}: a frame rate of {rate}; required is one of up to 1000 per second. Re-encode the clip."
        )
    return float(rate)
