"""Small clips written for tests, and surgery on their bytes."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import av
import numpy as np


def write_movie(
    frames: Iterable[Any], codec: str = "libx264", container: str = "mp4", fps: int = 25, **options: str
) -> bytes:
    """Encodes uint8 [H, W, 3] frames."""
    frames = list(frames)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return buffer.getvalue()


def greys(count: int, height: int = 64, width: int = 96) -> list[Any]:
    """Plain frames, told apart by their level: frame k is 4k."""
    return [np.full((height, width, 3), 4 * k % 256, np.uint8) for k in range(count)]


def hide_frames(data: bytes, hidden: Sequence[int]) -> bytes:
    """A VP8 file whose packets `hidden` are marked as not shown, as alternative reference frames are."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="webm") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for k, packet in enumerate(p for p in source.demux(video=0) if p.size):
            payload = bytearray(bytes(packet))
            if k in hidden:
                payload[0] &= ~0x10  # show_frame
            copy = av.Packet(bytes(payload))
            copy.pts, copy.dts, copy.time_base, copy.stream = packet.pts, packet.dts, packet.time_base, stream
            copy.is_keyframe = packet.is_keyframe
            output.mux(copy)
    return buffer.getvalue()


def turn_right(data: bytes) -> bytes:
    """Writes a rotation by 90 degrees clockwise into the track header of an MP4."""
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    return data[:at] + struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30) + data[at + 36 :]


def claim_length(data: bytes, frames: int) -> bytes:
    """Lets the time table of an MP4 claim another number of frames."""
    at = data.index(b"stts") + 4 + 8
    return data[:at] + struct.pack(">I", frames) + data[at + 4 :]
