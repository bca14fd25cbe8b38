"""An MP4, MKV or WebM file as numbered frames, through PyAV. Runs in a worker process or in this one.

Only the wanted frames are converted to RGB, and only the stretches of the stream that they need are decoded. The length
is counted from packets, never believed from the header. Which frames are wanted is decided elsewhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from kvkeye.errors import MediaError
from kvkeye.media.decode.packets import PacketIndex, Run, read_packets
from kvkeye.media.frame import Frame, ShorterThanCounted, check_dimensions
from kvkeye.media.limits import MediaLimits

log = logging.getLogger("kvkeye.media")

CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mjpeg")
SKIPPING = ("h264",)  # whose packets say for certain that no other frame refers to theirs
MAX_THREADS = 4  # of one clip's codec; each holds frames of its own
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_EBML = b"\x1a\x45\xdf\xa3"
_BUFFER_BYTES = 1 << 18  # read from the file at one time


class VideoFile:
    """A video stream in an open file. Raises `MediaError` for anything but the containers and codecs listed above."""

    index: PacketIndex | None

    def __init__(self, file: BinaryIO, limits: MediaLimits, where: str) -> None:
        self.file, self.limits, self.where = file, limits, where
        self.deadline = time.monotonic() + limits.max_decode_seconds
        self.format = _sniff(file, where)
        with self._stream() as (container, stream):
            self.fps = _frame_rate(stream, where)
            # Counting stops one past the limit on duration.
            most = int(limits.max_video_seconds * self.fps) + 1
            context = stream.codec_context
            self.codec = context.codec.canonical_name
            self.num_frames, self.index = read_packets(
                container.demux(stream), self.codec, bytes(context.extradata or b""), most, self._check_deadline
            )
        if self.num_frames == 0:
            raise self._no_frames()
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
        self._reformatter = VideoReformatter()

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yields uint8 [H, W, 3] for non-decreasing indices. Raises `MediaError`, `ShorterThanCounted`."""
        for frame in self._jump(indices, self.index) if self.index is not None else self._count(indices):
            rgb = self._to_rgb(frame)
            asked = time.monotonic()
            yield rgb
            self.deadline += time.monotonic() - asked  # the reader's time is not the decoder's

    def _count(self, indices: Sequence[int]) -> Iterator[Any]:
        """Decodes everything up to the last wanted frame."""
        wanted = iter(indices)
        target = next(wanted, None)
        count = 0
        with self._stream() as (container, stream):
            for frame in self._decode(container, stream):
                while target == count:
                    yield frame
                    target = next(wanted, None)
                if target is None:
                    return
                count += 1
        if target is not None:
            if count == 0:
                raise self._no_frames()
            log.info("%s: %d packets gave %d frames", self.where, self.num_frames, count)
            raise ShorterThanCounted(count)

    def _jump(self, indices: Sequence[int], index: PacketIndex) -> Iterator[Any]:
        """Decodes the stretches that the wanted frames need; frames are known by their time stamps."""
        with self._stream() as (container, stream):
            packets = enumerate(packet for packet in container.demux(stream) if packet.size)
            for run in index.plan(indices):
                stream.codec_context.flush_buffers()
                wanted = iter(run.wanted)
                target = next(wanted, None)
                for frame in self._decode_run(packets, stream.codec_context, run):
                    if target is None or frame.pts is None or frame.pts > target:
                        break
                    while frame.pts == target:
                        yield frame
                        target = next(wanted, None)
                if target is not None:
                    log.info("%s: the frame at time stamp %d did not come; frames are counted", self.where, target)
                    self.index = None
                    raise ShorterThanCounted(self.num_frames)

    def _decode_run(self, packets: Iterator[tuple[int, Any]], context: Any, run: Run) -> Iterator[Any]:
        """Frames of packets [run.start, run.stop): the wanted ones, in order, and some of the others."""
        for ordinal, packet in packets:
            if ordinal >= run.start:
                self._check_deadline()
                if self.codec in SKIPPING:
                    context.skip_frame = "DEFAULT" if ordinal in run.packets else "NONREF"
                yield from context.decode(packet)
            if ordinal + 1 >= run.stop:
                break
        yield from context.decode(None)

    @contextmanager
    def _stream(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first video stream, opened at the beginning with a forced demuxer."""
        self.file.seek(0)
        try:
            with av.open(
                self.file, format=self.format, metadata_errors="ignore", buffer_size=_BUFFER_BYTES
            ) as container:
                if not container.streams.video:
                    raise MediaError(f"{self.where}: the file holds no video stream; send one that does.")
                stream = container.streams.video[0]
                self._check_codec(stream)
                yield container, stream
        except MemoryError:
            raise MediaError(
                f"{self.where}: decoding takes more memory than allowed. Re-encode the clip at a smaller size."
            ) from None
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
        context.thread_count = min(os.cpu_count() or 1, MAX_THREADS)

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise MediaError(
                f"{self.where}: decoding took longer than {self.limits.max_decode_seconds:g} s. "
                "Send a shorter or smaller clip."
            )

    def _no_frames(self) -> MediaError:
        return MediaError(f"{self.where}: no frame could be decoded; the video is empty or damaged.")

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        for frame in container.decode(stream):
            self._check_deadline()
            yield frame

    def _to_rgb(self, frame: Any) -> Frame:
        if (frame.height, frame.width) != self.coded_size:
            raise MediaError(f"{self.where}: the picture size changes within the clip; re-encode it at one size.")
        plane = self._reformatter.reformat(frame, format="rgb24").planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
        rgb = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
        return np.ascontiguousarray(np.rot90(rgb, self.quarter_turns))


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
