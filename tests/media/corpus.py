"""Media made to harm or to confuse, generated: name -> (bytes, what the refusal says)."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.media.movies import claim_length, greys, write_movie

UNREADABLE = "no readable JPEG, PNG or WebP"
NO_MOVIE = "no MP4, MKV or WebM"
DAMAGED = "truncated or damaged"


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims width x height pixels, one bit each, all present."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, chunk(b"IDAT", rows))


def text_bomb() -> bytes:
    """100 MB of zeros in the comment of a small picture."""
    packer = zlib.compressobj(9)
    zeros = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    return png(8, 8, chunk(b"zTXt", b"comment\0\0" + zeros), chunk(b"IDAT", zlib.compress(bytes(16))))


def claim_webp(width: int, height: int) -> bytes:
    """A WebP whose header claims another size."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # after the chunk's head and the signature
    data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


def claim_jpeg(width: int, height: int) -> bytes:
    data = bytearray(encode(Image.new("RGB", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def animated(kind: str, count: int = 4) -> bytes:
    pictures = [Image.new("RGB", (4, 4), (k * 80 % 256, 0, 0)) for k in range(count)]
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:])


def bombs() -> Iterator[tuple[str, bytes, str]]:
    yield "png 169 Mpx", bomb(13_000, 13_000), "13000x13000 pixels; at most"
    yield "png 210 Mpx", bomb(30_000, 7_000), "more than 64000000 pixels|30000x7000 pixels"
    yield "png largest sides", png(2**31 - 1, 2**31 - 1), "more than 64000000 pixels"
    yield "png no side", png(0, 5), UNREADABLE + "|at least 1"
    yield "png comment of 100 MB", text_bomb(), UNREADABLE + "|" + DAMAGED
    yield "webp 268 Mpx", claim_webp(16_384, 16_384), "16384x16384 pixels; at most|" + UNREADABLE
    yield "jpeg 4 Gpx", claim_jpeg(65_500, 65_500), "more than 64000000 pixels|65500x65500 pixels"


def disguised(kind: str) -> Iterator[tuple[str, bytes, str]]:
    """Files of other kinds; `kind` is what they are sent as."""
    says = UNREADABLE if kind == "image" else NO_MOVIE
    texts = {
        "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/hostname"/></svg>',
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
        "html": b"<!doctype html><html><img src=x onerror=alert(1)></html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        "ffconcat": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "concat": b"file '/etc/hostname'\n" * 3,
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 1 RTP/AVP 96\n",
        "mpd": b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>',
        "shell": b"#!/bin/sh\nexit 1\n",
        "zip": b"PK\x03\x04" + bytes(60),
        "zeros": bytes(4096),
    }
    for name, data in texts.items():
        yield name, data, says
    yield "gif", animated("GIF", 30), says
    if kind == "image":
        yield "mp4", write_movie(greys(3)), says
        yield "animated png", animated("PNG"), "an animated PNG"
        yield "animated webp", animated("WEBP"), "an animated WEBP"
        yield "tiff", encode(Image.new("RGB", (4, 4)), "TIFF"), says
    else:
        yield "png", encode(Image.new("RGB", (64, 64))), says
        yield "mp4 head, playlist inside", b"\0\0\0\x18ftypisom" + texts["m3u8"], DAMAGED + "|no video stream"


def movies_that_lie() -> Iterator[tuple[str, bytes, str]]:
    movie = write_movie(greys(10))
    yield "2^31 frames claimed", claim_length(movie, 2**31 - 1), DAMAGED + "|10 frames"
    yield "1 kHz and more", change(movie, b"mdhd", 4 + 12, struct.pack(">I", 2**31)), "frame rate|no frame|" + DAMAGED
    yield "boxes in boxes", b"\0\0\0\x10ftypisom\0\0\0\0" + nested(b"moov", 4000), DAMAGED + "|no video stream"
    yield "codec unknown", movie.replace(b"avc1", b"zzzz"), "codec|" + DAMAGED
    yield "other file referred to", refer(movie, b"file:///etc/hostname"), DAMAGED
    yield "only a head", movie[: movie.index(b"mdat") + 4], DAMAGED


def change(movie: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """Overwrites `value` at `offset` after the name of a box."""
    at = movie.index(box) + offset
    return movie[:at] + value + movie[at + len(value) :]


def nested(name: bytes, depth: int) -> bytes:
    return b"".join(struct.pack(">I", 8 * (depth - k)) + name for k in range(depth))


def refer(movie: bytes, address: bytes) -> bytes:
    """An MP4 that says its frames lie in another file: the flag of the data reference is cleared."""
    at = movie.index(b"url ") + 4
    assert movie[at : at + 4] == b"\0\0\0\1"
    return movie[:at] + bytes(4) + movie[at + 4 :] + address


def absurd_duration(count: int = 10) -> bytes:
    """A Matroska file whose header claims 1e300 ticks."""
    data = bytearray(write_movie(greys(count), container="matroska"))
    at = data.index(b"\x44\x89") + 2
    assert data[at] == 0x88  # eight bytes follow
    data[at + 1 : at + 9] = struct.pack(">d", 1e300)
    return bytes(data)
