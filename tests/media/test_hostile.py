"""Media made to harm, through worker processes: one clear refusal each, bounded memory, workers that go on."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.job import MediaSettings
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.media.sampling import VideoPolicy
from tests.media import corpus
from tests.media.movies import greys, write_movie
from tests.samples import clip, photo

PREVIEW = MediaSettings("preview", 3136, 1_003_520)
FAST = MediaSettings("1.5", 3136, 1_003_520, video=VideoPolicy.slow_fast())
LIMITS = MediaLimits(max_decode_seconds=600.0)
WHERE = "messages[0].content[1]"


@pytest.fixture(scope="module")
def decoder():
    with MediaDecoder(1) as decoder:
        yield decoder


def load(decoder, kind, source, settings=PREVIEW, limits=LIMITS, **options):
    parsed = MediaOptions.parse(kind, options, WHERE)
    return load_media(kind, source, parsed, settings, limits, WHERE, decoder=decoder)


def worker_ids(decoder):
    return {worker.process.pid for worker in decoder._workers}


def memory(name, pid="self"):
    return int(re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10


def refuse(decoder, kind, data, says):
    """The refusal of one item, its text and its memory."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmHWM")
    with pytest.raises(MediaError, match=says) as raised:
        load(decoder, kind, data)
    message = str(raised.value)
    assert message.startswith(f"{WHERE}: ") and len(message) < 400
    assert not re.search(r"\b0x[0-9a-f]{6}|Errno|Traceback|/etc", message)
    assert memory("VmHWM") - before < (30 << 20) + len(data)


def name_of(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("name", "data", "says"), list(corpus.bombs()), ids=name_of)
def test_bombs(decoder, name, data, says):
    refuse(decoder, "image", data, says)
    assert memory("VmRSS", worker_ids(decoder).pop()) < 500 << 20


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_of_other_kinds(decoder, kind):
    for _, data, says in corpus.disguised(kind):
        refuse(decoder, kind, data, says)


@pytest.mark.parametrize(("name", "data", "says"), list(corpus.movies_that_lie()), ids=name_of)
def test_movies_that_lie(decoder, name, data, says):
    try:
        item = load(decoder, "video", data)
    except MediaError:
        refuse(decoder, "video", data, says)
    else:  # what it says of itself was not believed
        assert name in ("2^31 frames claimed", "other file referred to") and len(item.groups[0]) == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_at_every_tenth(decoder, kind):
    whole = corpus.encode(Image.fromarray(corpus.noise(90, 120, 3)), kind)
    for tenth in range(10):
        refuse(decoder, "image", whole[: len(whole) * tenth // 10], "empty|truncated or damaged|no readable")
    assert load(decoder, "image", whole).groups[0].shape[0] == 1


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("libx264", "matroska"), ("libvpx", "webm")])
def test_a_clip_cut_at_every_tenth(decoder, codec, container):
    """An MP4 without its end has no table of contents; of the others the frames that are there can be shown."""
    whole = write_movie(corpus.noise(24, 64, 96, 3), codec, container)
    for tenth in range(10):
        cut = whole[: len(whole) * tenth // 10]
        try:
            item = load(decoder, "video", cut, fps=25.0)
        except MediaError:
            refuse(decoder, "video", cut, "empty|truncated or damaged|no frame|no video stream|no MP4")
        else:
            assert container != "mp4" and 2 <= len(item.groups[0]) < 24
    assert len(load(decoder, "video", whole, fps=25.0).groups[0]) == 24


def test_what_is_odd_but_valid(decoder):
    late = write_movie(greys(10))
    early = write_movie(greys(10), movflags="faststart")
    assert late.index(b"moov") > late.index(b"mdat")
    shown = [load(decoder, "video", data).groups[0] for data in (late, early, corpus.absurd_duration())]
    assert all(np.array_equal(frames, shown[0]) for frames in shown)


def test_the_extension_means_nothing(decoder, tmp_path):
    movie, picture = tmp_path / "movie.png", tmp_path / "picture.mp4"
    movie.write_bytes(write_movie(greys(4)))
    picture.write_bytes(photo("astronaut.png").read_bytes())
    assert load(decoder, "video", movie).groups[0].shape[0] == 4
    assert load(decoder, "image", picture).sizes == [(504, 504)]


def test_one_worker_survived_all_of_it(decoder):
    """Refusals come from a worker that goes on, not from one that died."""
    load(decoder, "image", photo("astronaut.png"))
    before = worker_ids(decoder)
    test_files_of_other_kinds(decoder, "image")
    assert worker_ids(decoder) == before


def strike(decoder, blow):
    """Sends the worker a signal while it decodes a clip; returns the refusal's text."""
    load(decoder, "image", photo("astronaut.png"))
    (pid,) = worker_ids(decoder)
    timer = threading.Timer(0.15, os.kill, (pid, blow))
    timer.start()
    try:
        with pytest.raises(MediaError) as raised:
            for _ in range(200):
                load(decoder, "video", clip("bikes.mp4"), FAST, MediaLimits(max_decode_seconds=4.0), fps=25.0)
    finally:
        timer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert load(decoder, "image", photo("astronaut.png")).sizes == [(504, 504)]
    return str(raised.value)


@pytest.mark.parametrize(("blow", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_a_worker_that_dies_costs_its_item_only(decoder, blow, name):
    assert strike(decoder, blow) == (
        f"{WHERE}: the decoding process ended (signal {name}) while it read this file; re-encode the file."
    )


def test_a_worker_that_stalls_is_killed_in_time(decoder):
    start = time.monotonic()
    assert strike(decoder, signal.SIGSTOP).startswith(f"{WHERE}: decoding took longer than 4 s")
    assert time.monotonic() - start < 300


def test_time_is_limited_while_a_worker_decodes(decoder):
    with pytest.raises(MediaError, match=r"decoding took longer than 0\.02 s"):
        load(decoder, "video", clip("bigbuckbunny.mp4"), limits=MediaLimits(max_decode_seconds=0.02), nframes=130)


def test_memory_is_limited():
    """A picture within all limits that does not fit the worker's own."""
    with MediaDecoder(1, max_worker_memory=600 << 20) as small:
        large = corpus.encode(Image.new("RGB", (9_000, 7_000)), "JPEG", quality=20)
        with pytest.raises(MediaError, match=r"more memory than allowed|process ended"):
            load(small, "image", large)
        assert load(small, "image", photo("astronaut.png")).sizes == [(504, 504)]
