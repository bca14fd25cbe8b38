"""Streaming decode, the writer, metrics and the report."""

from __future__ import annotations

import os
import subprocess
import sys

import av
import pytest
import torch
from PIL import Image

from kvkeye.errors import CapacityError, ConfigError
from kvkeye.video.decode import is_streaming, stream_frames
from kvkeye.video.metrics import VideoMetrics, VideoScores
from kvkeye.video.report import FrameStrip, write_report
from kvkeye.video.writer import VideoWriter
from tests.video import tiny


@pytest.mark.parametrize("num_frames", [5, 17, 33])
@pytest.mark.parametrize(
    ("make", "call"),
    [(tiny.wan, tiny.wan_call), (tiny.cogvideox, tiny.cogvideox_call), (tiny.hunyuan, tiny.hunyuan_call)],
    ids=["wan", "cogvideox", "hunyuan"],
)
def test_streamed_frames_are_the_pipelines_own(make, call, num_frames):
    """Oracle (i), to the bit. HunyuanVideo's tiles in time begin at 17 frames."""
    pipe = make()
    steps = {"num_inference_steps": 1}
    latents = pipe(**call(num_frames, **steps)).frames
    whole = pipe(**call(num_frames, **steps, output_type="pt")).frames[0].float()
    pieces = list(stream_frames(pipe, latents))
    assert torch.equal(torch.cat(pieces), whole)
    assert max(map(len, pieces)) <= 17 and (len(pieces) > 1 or num_frames <= 17)


def test_vaes_that_decode_whole_clips_say_so():
    pipe = tiny.ltx()
    assert not is_streaming(pipe) and is_streaming(tiny.wan())
    with pytest.raises(ConfigError, match="AutoencoderKLLTXVideo decodes whole clips"):
        next(stream_frames(pipe, torch.zeros(1, 192, 8)))


MEMORY = """
import resource, sys, torch
from pathlib import Path
from kvkeye.video.decode import stream_frames
from kvkeye.video.writer import VideoWriter
from tests.video import tiny
torch.set_num_threads(1)
latents = torch.randn(1, 16, 80, 12, 12)
with VideoWriter(Path(sys.argv[1]), 16, 96, 96) as writer:
    for i, frames in enumerate(stream_frames(tiny.wan(), latents)):
        writer.write(frames)
        if i in (20, 79):
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_of_decoding_and_writing_does_not_grow_with_length(tmp_path):
    """From 81 to 317 frames, 26 MB of pixels, at most 6 MB more. The allocator is told to give memory back at once."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.mp4")]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    early, late = (int(line) / 1024 for line in done.stdout.split())
    assert late - early < 6, (early, late)


def ramp(num_frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """A bright square that moves right by two pixels a frame over a gradient."""
    base = torch.linspace(0.2, 0.5, width).expand(3, height, width)
    frames = base.repeat(num_frames, 1, 1, 1)
    for i, frame in enumerate(frames):
        columns = (torch.arange(8) + 2 * i) % width
        frame[0, 8:20, columns] = 0.9
    return frames


def decoded(path) -> torch.Tensor:
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).permute(0, 3, 1, 2) / 255


def test_writer_keeps_frames_and_rate_and_repeats_its_bytes(tmp_path):
    written = set()
    for _ in range(40):
        with VideoWriter(tmp_path / "a.mp4", 12.5, 32, 48) as writer:
            for piece in ramp(21).split(4):
                writer.write(piece)
        assert writer.num_frames == 21
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1
    back = decoded(tmp_path / "a.mp4")
    assert back.shape == (21, 3, 32, 48) and (back - ramp(21)).abs().mean() < 0.02
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 12.5


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 12, 32, 48) as writer:
        writer.write(ramp(3))
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="was begun with"), VideoWriter(tmp_path / "a.mp4", 12, 32, 48) as writer:
        writer.write(ramp(3, height=16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
def test_a_full_disk_is_said_and_names_the_way_on(tmp_path):
    (tmp_path / "a.mp4.partial").symlink_to("/dev/full")
    full = pytest.raises(CapacityError, match=r"disk is full .* latents are saved")
    with full, VideoWriter(tmp_path / "a.mp4", 12, 256, 256) as writer:
        for _ in range(8):
            writer.write(torch.rand(4, 3, 256, 256))


# Metrics on the synthetic clips of the reference: each defect moves its own number.


def scored(frames: torch.Tensor, borders: tuple[int, ...] = ()) -> VideoScores:
    metrics = VideoMetrics()
    for piece in frames.split(5):
        metrics.add(piece)
    return metrics.scores(borders)


BORDERS = (24, 48)


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    noise = torch.randn(72, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 0.004
    return (ramp(72) + noise).clamp(0, 1)


def test_a_seam_shows_at_its_border_only(base):
    jumping = base.clone()
    jumping[24:] = jumping[24:].roll(12, -1)
    good, bad = scored(base, BORDERS), scored(jumping, BORDERS)
    assert 0.9 < good.seam_ratio < 1.1 and bad.seam_ratio > 1.5 * good.seam_ratio
    assert bad.seam_jerk > 1.5 * good.seam_jerk


def test_drift_flicker_and_stillness_move_their_own_numbers(base):
    good = scored(base)
    drift = scored((base + torch.linspace(0, 0.12, 72).view(-1, 1, 1, 1)).clamp(0, 1))
    assert 0.09 < drift.color_drift < 0.13 and good.color_drift < 0.015
    flicker = scored((base + 0.02 * (-1.0) ** torch.arange(72).view(-1, 1, 1, 1)).clamp(0, 1))
    assert flicker.luma_flicker > 10 * good.luma_flicker and flicker.flicker < good.flicker - 0.02
    noise = torch.randn(72, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 0.004
    still = scored((base[:1] + noise).clamp(0, 1))
    assert still.motion < 0.1 * good.motion, "the noise floor is taken off"
    assert still.subject > good.subject, "a frozen clip is the most consistent: read motion beside it"


def test_a_loop_shows_at_its_period(base):
    metrics = VideoMetrics()
    metrics.add(base)
    assert int(metrics.loop_curve().argmax()) + 8 == 24  # the square wraps after 48 / 2 frames
    drawn = torch.rand(60, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    assert scored(drawn).loop < 0.2 < 0.9 < scored(base).loop


def test_metrics_want_three_frames():
    with pytest.raises(ValueError, match="got 2 frames"):
        scored(ramp(2))


def test_report_shows_frames_curves_and_candidates(base, tmp_path):
    metrics, strip = VideoMetrics(), FrameStrip()
    for piece in base.split(7):
        metrics.add(piece)
        strip.add(piece)
    scores = [{"seed": 5, "step": 3, "score": 0.8}, {"seed": 6, "step": 3, "score": float("-inf")}]
    facts = {"chunks": [{"index": i, "chosen": 5, "scores": scores, "seeds": [5, 6]} for i in range(3)]}
    found = write_report(tmp_path, "a title", strip, metrics, BORDERS, 12, facts)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1400 and len(set(picture.convert("L").tobytes())) > 50
    text = (tmp_path / "report.json").read_text()
    assert f'"seam_ratio": {found.seam_ratio}' in text and '"chosen": 5' in text


def test_a_strip_stays_small_however_long_the_clip():
    strip = FrameStrip()
    for _ in range(40):
        strip.add(torch.rand(25, 3, 8, 8))
    assert len(strip.kept) <= 33 and strip.seen == 1000
    places = [at for at, _ in strip.chosen()]
    assert len(places) == 16 and places[0] == 0 and places[-1] > 900
