"""Worker processes: the same pixels and the same refusals as in this process, limits, rights, and their end."""

from __future__ import annotations

import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvkeye.errors import CapacityError, ConfigError, MediaError
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.image import load_image
from kvkeye.media.job import MediaSettings
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.media.sampling import VideoPolicy
from tests.media.corpus import encode, noise
from tests.media.movies import greys, hide_frames, turn_right, write_movie
from tests.samples import clip, photo

PREVIEW = MediaSettings("preview", 3136, 1_003_520)
FAST = MediaSettings("1.5", 3136, 1_003_520, video=VideoPolicy.slow_fast())
LIMITS = MediaLimits(max_decode_seconds=600.0)  # the machine may be busy


@pytest.fixture(scope="module")
def decoder():
    with MediaDecoder(2) as decoder:
        yield decoder


def load(decoder, kind, source, settings=PREVIEW, limits=LIMITS, **options):
    parsed = MediaOptions.parse(kind, options, "item")
    if decoder is None:
        return load_media(kind, source, parsed, settings, limits, "item")
    return load_media(kind, source, parsed, settings, limits, "item", decoder=decoder)


def is_alive(pid):
    """A process that has ended and waits to be collected does not count."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "waited for 300 s"
        time.sleep(0.02)


def pictures():
    colour = Image.fromarray(noise(13, 21, 3))
    turned = Image.Exif()
    turned[0x0112] = 6
    yield encode(colour)
    yield encode(colour, "JPEG")
    yield encode(colour, "JPEG", progressive=True, exif=turned)
    yield encode(colour, "WEBP", lossless=True)
    yield encode(colour.convert("L"), "JPEG")
    yield encode(colour.convert("CMYK"), "JPEG")
    yield encode(colour.quantize(7), transparency=0)
    yield encode(colour.convert("LA"))
    yield encode(Image.fromarray(noise(9, 8, 4)), exif=turned)
    yield encode(Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)))
    yield photo("rocket.jpg")


@pytest.mark.parametrize("options", [{}, {"alpha": "drop", "apply_orientation": False}])
def test_pictures_are_the_same(decoder, options, tmp_path):
    for k, source in enumerate(pictures()):
        expected = load_image(source, LIMITS, **options)
        got = load_image(source, LIMITS, decoder=decoder, **options)
        assert got.flags.writeable and np.array_equal(got, expected)
        if isinstance(source, bytes):
            path = tmp_path / f"{k}"
            path.write_bytes(source)
            assert np.array_equal(load_image(path, LIMITS, decoder=decoder, **options), expected)


@pytest.mark.parametrize("settings", [PREVIEW, FAST])
@pytest.mark.parametrize(
    "source",
    [
        lambda: clip("bikes.mp4"),
        lambda: clip("carphone_pristine.mp4").read_bytes(),
        lambda: turn_right(write_movie(greys(9, 70, 90))),  # rows of odd length, and a rotation
        lambda: hide_frames(write_movie(greys(30), "libvpx", "webm"), hidden=[4, 5, 11]),
        lambda: [encode(Image.fromarray(frame)) for frame in greys(3)],
    ],
)
def test_clips_are_the_same(decoder, settings, source):
    for limits in (LIMITS, replace(LIMITS, max_decoded_bytes=20 << 20)):
        here, there = (load(d, "video", source(), settings, limits) for d in (None, decoder))
        assert here.frame_types == there.frame_types and here.timestamps == there.timestamps
        assert here.seconds_per_grid == there.seconds_per_grid
        assert all(np.array_equal(a, b) for a, b in zip(here.groups, there.groups, strict=True))


@pytest.mark.parametrize(
    ("kind", "source", "limits"),
    [
        ("image", b"This is a text file.\n" * 30, LIMITS),
        ("image", photo("rocket.jpg").read_bytes()[:50_000], LIMITS),
        ("image", photo("astronaut.png"), MediaLimits(max_side=500)),
        ("image", "no/such/file.png", LIMITS),
        ("video", b"", LIMITS),
        ("video", b"This is a text file.\n" * 30, LIMITS),
        ("video", clip("bikes.mp4").read_bytes()[:200_000], LIMITS),
        ("video", clip("bikes.mp4"), MediaLimits(max_video_seconds=3.0)),
        ("video", clip("bikes.mp4"), MediaLimits(max_side=500)),
        ("video", [b"no picture"], LIMITS),
    ],
)
def test_refusals_are_the_same(decoder, kind, source, limits):
    texts = []
    for place in (None, decoder):
        with pytest.raises(MediaError) as raised:
            load(place, kind, source, limits=limits)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


def test_a_worker_is_small_and_has_few_rights(decoder):
    load(decoder, "image", photo("astronaut.png"))
    for worker in decoder._workers:
        process = Path(f"/proc/{worker.process.pid}")
        assert "torch" not in (process / "maps").read_text()
        status = dict(line.split(":\t") for line in (process / "status").read_text().splitlines() if ":\t" in line)
        assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
        assert len(list((process / "fd").iterdir())) <= 5  # three times nothing, and the connection
        assert b"HOME=" not in (process / "environ").read_bytes()


RIGHTS = """
import ctypes, errno, os, socket, threading
from kvkeye.media.decode.sandbox import filter_calls, limit_process
limit_process(1 << 30, 64)
assert filter_calls()
def refused(call):
    try:
        call()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES)
    return False
assert refused(lambda: open("/dev/null"))
assert refused(lambda: open("made", "w"))
assert refused(lambda: socket.socket())
assert refused(lambda: os.fork())
assert refused(lambda: os.execv("/bin/true", ["true"]))
assert refused(lambda: os.kill(os.getppid(), 0))
assert refused(lambda: os.memfd_create("x"))
assert refused(lambda: os.unlink("/nothing"))
done = []
thread = threading.Thread(target=done.append, args=(1,))
thread.start(); thread.join()
assert done == [1]
try:
    bytearray(2 << 30)
except MemoryError:
    done.append(2)
assert done == [1, 2]
os.write(1, b"fine")
"""


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, timeout=120, cwd=Path(__file__).parents[2]
    )


def test_what_a_worker_may_not_do(tmp_path):
    result = run(RIGHTS)
    assert result.stdout == b"fine", result.stderr.decode()


def test_cpu_time_is_limited():
    result = run("from kvkeye.media.decode.sandbox import limit_cpu\nlimit_cpu(0.0)\nwhile True: pass")
    assert result.returncode == -signal.SIGXCPU


def test_threads_share_the_workers(decoder):
    expected = load(None, "image", photo("astronaut.png")).groups[0]
    errors, most = [], []

    def work():
        for k in range(6):
            try:
                item = load(decoder, "image", photo("astronaut.png"))
                assert np.array_equal(item.groups[0], expected)
                load(decoder, "video", write_movie(greys(6)), FAST)
                if k % 2:
                    with pytest.raises(MediaError):
                        load(decoder, "image", b"text" * 9)
            except BaseException as error:
                errors.append(error)
            most.append(len(decoder._workers))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and max(most) == 2 and len(decoder._idle) == 2


def test_a_clip_that_is_given_up_costs_its_worker_only(decoder):
    with clip("bikes.mp4").open("rb") as file, decoder.video(file, LIMITS, "clip") as movie:
        for _ in movie.frames(range(250)):
            break
    assert load(decoder, "video", clip("carphone_pristine.mp4")).groups[0].shape[0] == 8


def test_a_worker_that_died_idle_is_replaced(decoder):
    load(decoder, "image", photo("astronaut.png"))
    for worker in decoder._workers:
        worker.process.kill()
        worker.process.wait()
    assert load(decoder, "image", photo("astronaut.png")).sizes == [(504, 504)]


def test_nothing_starts_before_the_first_file_and_nothing_remains():
    with MediaDecoder(2) as decoder:
        load(decoder, "video", greys(4))
        load(decoder, "image", Image.new("RGB", (30, 30)))
        assert not decoder._workers
        load(decoder, "image", photo("astronaut.png"))
        (pid,) = [worker.process.pid for worker in decoder._workers]
        assert is_alive(pid)
    assert not is_alive(pid)
    decoder.close()
    with pytest.raises(CapacityError, match="closed"):
        load(decoder, "image", photo("astronaut.png"))


def test_a_forgotten_decoder_ends_its_workers():
    decoder = MediaDecoder(1)
    load(decoder, "image", photo("astronaut.png"))
    (pid,) = [worker.process.pid for worker in decoder._workers]
    del decoder
    gc.collect()
    assert not is_alive(pid)


ORPHANS = """
import os, signal, sys
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.limits import MediaLimits
decoder = MediaDecoder(1)
with open(sys.argv[1], "rb") as file, decoder.video(file, MediaLimits(), "clip") as movie:
    frames = movie.frames(range(100))
    next(frames)
    print(*(worker.process.pid for worker in decoder._workers), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed():
    result = run(ORPHANS, str(clip("bikes.mp4")))
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    wait_for(lambda: not is_alive(int(result.stdout)))


FORK = """
import os, sys
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.limits import MediaLimits
decoder = MediaDecoder(1)
def decode():
    with open(sys.argv[1], "rb") as file:
        return decoder.picture(file, MediaLimits(), "picture", "white", True).shape
decode()
child = os.fork()
if child == 0:
    os._exit(decode() != (512, 512, 3))
assert os.waitpid(child, 0)[1] == 0
assert decode() == (512, 512, 3)
print("fine")
"""


def test_a_fork_has_workers_of_its_own():
    result = run(FORK, str(photo("astronaut.png")))
    assert result.stdout == b"fine\n", result.stderr.decode()


def test_without_workers_files_are_decoded_here():
    with MediaDecoder(0) as decoder:
        expected = load(None, "video", clip("carphone_pristine.mp4")).groups[0]
        assert np.array_equal(load(decoder, "video", clip("carphone_pristine.mp4")).groups[0], expected)
        assert load(decoder, "image", io.BytesIO(photo("astronaut.png").read_bytes()).getvalue()).groups[0].any()
        assert not decoder._workers


def test_platforms_without_workers(monkeypatch, caplog):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match=r"media_workers=2; required is 0 .* no memfd_create"):
        MediaDecoder(2)
    assert MediaDecoder().num_workers == 0
    assert "decoded in this process: this platform has no memfd_create" in caplog.text
    with pytest.raises(ConfigError, match="media_workers=-1; required is 0 or more"):
        MediaDecoder(-1)
