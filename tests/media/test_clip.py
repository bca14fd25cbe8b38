"""Clips as numbered frames: files, lists, limits and damage."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.clip import FrameList
from kvkeye.media.decode.video import VideoFile
from kvkeye.media.frame import ShorterThanCounted
from kvkeye.media.limits import MediaLimits
from tests.media.movies import claim_length, greys, hide_frames, turn_right, write_movie
from tests.samples import clip

LIMITS = MediaLimits(max_decode_seconds=600.0)  # the machine may be busy


def open_movie(data, limits=LIMITS):
    return VideoFile(io.BytesIO(data), limits, "messages[0].content[0]")


def test_frames_of_a_real_clip():
    data = clip("bikes.mp4").read_bytes()
    movie = open_movie(data)
    assert (movie.num_frames, movie.fps, movie.height, movie.width) == (250, 25.0, 272, 640)
    wanted = [0, 0, 13, 57, 57, 249]
    with av.open(str(clip("bikes.mp4"))) as container:
        every = [f.to_ndarray(format="rgb24") if k in wanted else None for k, f in enumerate(container.decode(video=0))]
    for _ in range(2):  # a clip can be read again
        got = list(movie.frames(wanted))
        assert all(np.array_equal(frame, every[k]) for frame, k in zip(got, wanted))
    assert list(movie.frames([])) == []


def test_only_wanted_frames_are_converted():
    class Counting(VideoFile):
        converted = 0

        def _to_rgb(self, frame):
            self.converted += 1
            return super()._to_rgb(frame)

    movie = Counting(clip("bikes.mp4").open("rb"), LIMITS, "clip")
    assert len(list(movie.frames([3, 100]))) == 2 and movie.converted == 2


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mp4"), ("libx264", "matroska"), ("libvpx", "webm"), ("libvpx-vp9", "webm"), ("mjpeg", "matroska")],
)
def test_containers_and_codecs(codec, container):
    movie = open_movie(write_movie(greys(12), codec, container))
    assert movie.num_frames == 12 and movie.fps == 25.0
    levels = [int(frame.mean().round()) for frame in movie.frames(range(12))]
    assert np.abs(np.array(levels) - 4 * np.arange(12)).max() <= 3


def test_rotation_is_applied():
    frames = greys(4)
    for frame in frames:
        frame[:20] = 250  # a bright band at the top
    data = write_movie(frames, qp="10")
    upright, turned = open_movie(data), open_movie(turn_right(data))
    assert (upright.height, upright.width) == (64, 96) and (turned.height, turned.width) == (96, 64)
    for a, b in zip(upright.frames([0, 3]), turned.frames([0, 3])):
        assert np.array_equal(np.rot90(a, -1), b)  # the band is now at the right
        assert b[:, -15:].mean() > 200 > b[:, :30].mean()


def test_hidden_frames_shorten_the_clip():
    data = hide_frames(write_movie(greys(20), "libvpx", "webm"), hidden=[4, 5, 11])
    movie = open_movie(data)
    assert movie.num_frames == 20
    with pytest.raises(ShorterThanCounted) as raised:
        list(movie.frames([0, 19]))
    assert raised.value.num_frames == 17
    assert len(list(movie.frames([0, 16]))) == 2


def test_a_claimed_length_is_not_believed():
    data = claim_length(write_movie(greys(10)), 2**31 - 1)
    try:
        movie = open_movie(data)
    except MediaError:
        return
    assert movie.num_frames == 10 and len(list(movie.frames([0, 9]))) == 2


def sound_only():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        sound.sample_rate = 44100
        output.mux(stream.encode(sound))
        output.mux(stream.encode())
    return buffer.getvalue()


def no_frames():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        output.start_encoding()
    return buffer.getvalue()


def gif(count):
    buffer = io.BytesIO()
    pictures = [Image.new("L", (4, 4), k % 256) for k in range(count)]
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (lambda: b"not a video, only text " * 20, "no MP4, MKV or WebM file"),
        (lambda: b"", "no MP4, MKV or WebM file"),
        (lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "no MP4, MKV or WebM file"),
        (lambda: b"ffconcat version 1.0\nfile /etc/hostname\n", "no MP4, MKV or WebM file"),
        (lambda: gif(900), "no MP4, MKV or WebM file"),
        (lambda: b"\0\0\0\x20ftypisom" + bytes(300), "damaged|no video stream|no frame"),
        (lambda: b"\x1a\x45\xdf\xa3" + bytes(300), "damaged|no video stream|no frame"),
        (lambda: clip("bikes.mp4").read_bytes()[:200_000], "truncated or damaged"),
        (sound_only, "no video stream"),
        (no_frames, "no frame could be decoded|no video stream|damaged|frame rate"),
        (lambda: write_movie(greys(3), "mpeg4"), "codec 'mpeg4'; accepted are h264"),
        (lambda: write_movie(greys(2, 16, 16 * 210)), r"aspect ratio of 210\.0"),
    ],
)
def test_unusable_files(data, says):
    with pytest.raises(MediaError, match=says) as raised:
        open_movie(data())
    assert str(raised.value).startswith("messages[0].content[0]: ")


def test_limits_on_length_size_and_time():
    data = write_movie(greys(50))
    assert open_movie(data, MediaLimits(max_video_seconds=2.0)).num_frames == 50
    with pytest.raises(MediaError, match=r"longer than 1\.9 s at 25 frames"):
        open_movie(data, MediaLimits(max_video_seconds=1.9))
    with pytest.raises(MediaError, match="96x64 pixels; at most 90 per side"):
        open_movie(data, MediaLimits(max_side=90))
    with pytest.raises(MediaError, match="decoding took longer than 0 s"):
        open_movie(data, MediaLimits(max_decode_seconds=0.0))


def test_the_bit_stream_cannot_outgrow_its_header():
    """Joined streams of two sizes: the decoder would follow; the clip is refused."""
    small, large = (write_movie(greys(2, side, side), container="h264") for side in (64, 128))
    buffer = io.BytesIO()
    with av.open(io.BytesIO(small + large), format="h264") as source, av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for k, packet in enumerate(p for p in source.demux(video=0) if p.size):
            packet.stream, packet.pts, packet.dts = stream, 40 * k, 40 * k
            output.mux(packet)
    movie = open_movie(buffer.getvalue())
    with pytest.raises(MediaError, match=r"picture size changes|damaged"):
        list(movie.frames(range(4)))


def test_random_damage_never_escapes():
    whole = write_movie(greys(8), "libx264", "matroska")
    rng = np.random.default_rng(7)
    outcomes = set()
    for _ in range(40):
        data = bytearray(whole[: rng.integers(40, len(whole) + 1)])
        for place in rng.integers(12, len(data), 5):
            data[place] = rng.integers(0, 256)
        try:
            movie = open_movie(bytes(data))
            outcomes.add(len(list(movie.frames([0, movie.num_frames - 1]))))
        except (MediaError, ShorterThanCounted) as error:
            outcomes.add(type(error).__name__)
    assert "MediaError" in outcomes


def test_frame_lists():
    frames = greys(5)
    for source in (frames, tuple(frames), np.stack(frames), torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)):
        listed = FrameList(source, 2.0, LIMITS, "clip")
        assert (listed.num_frames, listed.fps, listed.height, listed.width) == (5, 2.0, 64, 96)
        assert [int(f[0, 0, 0]) for f in listed.frames([0, 2, 2, 4])] == [0, 8, 8, 16]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "a list of 0 frames"),
        (np.zeros((0, 8, 8, 3), np.uint8), "a list of 0 frames"),
        (np.zeros((8, 8, 3), np.uint8), "required is"),
        (greys(1) * 1025, "a list of 1025 frames; at most 1024"),
        ([b"no picture"], "frame 0: 10 bytes"),
    ],
)
def test_unusable_lists(source, says):
    with pytest.raises(MediaError, match=says):
        FrameList(source, None, LIMITS, "clip")


def test_listed_frames_share_one_size():
    listed = FrameList([*greys(2), np.zeros((8, 8, 3), np.uint8)], None, LIMITS, "clip")
    with pytest.raises(MediaError, match="frame 2 has 8x8 pixels, frame 0 has 96x64"):
        list(listed.frames([0, 1, 2]))
