"""Frames reached by jumping are those reached by decoding through, to the bit, and only what they need is decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest

from kvkeye.media.decode.packets import GAP, PacketIndex
from kvkeye.media.decode.video import VideoFile
from kvkeye.media.frame import ShorterThanCounted
from kvkeye.media.limits import MediaLimits
from tests.media.movies import greys, hide_frames, write_movie
from tests.samples import clip

LIMITS = MediaLimits()


class Counting(VideoFile):
    """Remembers how many packets were decoded."""

    fed = 0

    def _decode_run(self, packets, context, run):
        self.fed += run.stop - run.start
        return super()._decode_run(packets, context, run)


def open_movie(data):
    return Counting(io.BytesIO(data), LIMITS, "clip")


def scenes(count=200):
    """Moving textures with a cut now and then, so that every kind of frame and reference occurs."""
    rng = np.random.default_rng(0)
    cards = rng.integers(0, 256, (4, 96, 160, 3), dtype=np.uint8)
    return [np.roll(cards[k // 60], 3 * k, axis=1)[:64, :96] for k in range(count)]


ENCODINGS = {
    "h264": ("libx264", "mp4", {"g": "24"}),
    "h264 with pyramids of B frames": ("libx264", "mp4", {"g": "40", "x264-params": "bframes=4:b-pyramid=normal"}),
    "h264 open": ("libx264", "matroska", {"g": "24", "x264-params": "open-gop=1:bframes=3"}),
    "h264 refreshed in stripes": ("libx264", "matroska", {"g": "24", "x264-params": "intra-refresh=1"}),
    "hevc": ("libx265", "mp4", {"x265-params": "keyint=24:open-gop=0:log-level=none:pools=1"}),
    "hevc open": ("libx265", "matroska", {"x265-params": "keyint=24:open-gop=1:log-level=none:pools=1"}),
    "vp8": ("libvpx", "webm", {"g": "24", "deadline": "realtime", "cpu-used": "8"}),
    "vp9, hidden frames": ("libvpx-vp9", "webm", {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "9"}),
    "mjpeg": ("mjpeg", "matroska", {}),
    "bikes": None,
    "bigbuckbunny": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_jumping_changes_no_pixel(name):
    encoding = ENCODINGS[name]
    if encoding is None:
        data = clip(f"{name}.mp4").read_bytes()
    else:
        codec, container, options = encoding
        data = write_movie(scenes(), codec, container, **options)
    movie = open_movie(data)
    index, total = movie.index, movie.num_frames
    assert isinstance(index, PacketIndex)
    movie.index = None
    through = list(movie.frames(range(total)))
    rng = np.random.default_rng(1)
    choices = [[0], [total - 1], list(range(0, total, 30)), *(sorted(rng.integers(0, total, n)) for n in (1, 3, 40))]
    for wanted in choices:
        movie.index, movie.fed = index, 0
        assert all(np.array_equal(frame, through[k]) for frame, k in zip(movie.frames(wanted), wanted, strict=True))
        assert movie.index is index and movie.fed <= total


def test_far_frames_are_reached_without_what_lies_between():
    movie = open_movie(write_movie(scenes(), "libx264", "mp4", g="20", sc_threshold="0"))
    assert movie.num_frames == 200
    for wanted, most in (([199], 21), ([3, 120], 4 + 1 + 4), ([0, 199], 1 + 21), (range(200), 200)):
        movie.fed = 0
        assert len(list(movie.frames(wanted))) == len(wanted)
        assert movie.fed <= most + 4  # packets of B frames follow the frames they precede


def test_plans():
    """Packets in the order of the file I B P, I B P, ...: time stamps 0 2 1, 3 5 4, ..."""
    pts = np.array([p for k in range(0, 60, 3) for p in (k, k + 2, k + 1)])
    index = PacketIndex(pts, np.argsort(pts), np.arange(0, 60, 3))
    (only,) = index.plan([0, 0, 1])
    assert (only.start, only.stop, only.wanted, only.packets) == (0, 3, [0, 0, 1], {0, 2})
    near, far = index.plan([2, 50])
    assert (near.start, near.stop) == (0, 2) and (far.start, far.stop) == (48, 50)
    (joined,) = index.plan([2, 2 + GAP])  # the gap is not worth a jump
    assert joined.start == 0


def test_a_frame_shown_before_its_key_frame_starts_earlier():
    """An open group: packet 3 is a key frame, packets 4 and 5 are shown before it and refer across it."""
    pts = np.array([0, 1, 2, 5, 3, 4, 6])
    index = PacketIndex(pts, np.argsort(pts), np.array([0, 3]))
    assert [index.plan([k])[0].start for k in range(7)] == [0, 0, 0, 0, 0, 3, 3]


def test_streams_whose_frames_cannot_be_told_from_packets():
    whole = write_movie(greys(20), "libvpx", "webm")
    assert open_movie(whole).index is not None
    assert open_movie(hide_frames(whole, hidden=[4])).index is None


def test_a_frame_that_does_not_come_is_noticed():
    """Then the same clip is read by counting."""
    movie = open_movie(write_movie(scenes(60)))
    index = movie.index
    expected = [frame.copy() for frame in movie.frames([7, 30])]
    movie.index = PacketIndex(index.pts * 2 + 1, index.order, index.keys)  # as if time stamps were not what they say
    with pytest.raises(ShorterThanCounted) as raised:
        list(movie.frames([7, 30]))
    assert raised.value.num_frames == 60 and movie.index is None
    assert all(np.array_equal(a, b) for a, b in zip(movie.frames([7, 30]), expected, strict=True))
