"""Frame types, sizes and pixels against keye-vl-utils itself, where it can be imported.

It is no part of the test extras because it needs torchvision and OpenCV; the vectors in `test_load` and `test_resize`
were taken from it. `make peers` brings both versions; 1.5's half runs by default, Preview's with `KEYE_VL_UTILS=1.0.0`.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kvkeye import ops
from kvkeye.media.job import MediaSettings
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.media.sampling import VideoPolicy
from tests.samples import clip

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _keye_vl_utils

VERSION = os.environ.get("KEYE_VL_UTILS", "1.5.2")
if not _keye_vl_utils.is_installed(VERSION):
    pytest.skip(
        f"keye-vl-utils {VERSION} is not in .peers (make peers); its recorded answers are tested",
        allow_module_level=True,
    )

reference = _keye_vl_utils.load(VERSION)


class Reader:
    """The part of decord's reader that the package calls, over PyAV."""

    def __init__(self, path):
        with av.open(str(path)) as container:
            self.rate = float(container.streams.video[0].average_rate)
            self.frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    def __len__(self):
        return len(self.frames)

    def get_avg_fps(self):
        return self.rate

    def get_batch(self, indices):
        return types.SimpleNamespace(asnumpy=lambda: np.stack([self.frames[i] for i in indices]))


@pytest.fixture(autouse=True)
def decord(monkeypatch):
    module = types.ModuleType("decord")
    module.VideoReader = Reader
    monkeypatch.setitem(sys.modules, "decord", module)
    if hasattr(reference, "get_video_reader_backend"):
        monkeypatch.setattr(reference, "get_video_reader_backend", lambda: "decord")


def load(name, settings, options):
    parsed = MediaOptions.parse("video", options, "clip")
    return load_media("video", clip(f"{name}.mp4"), parsed, settings, MediaLimits(), "clip")


@pytest.mark.skipif(not VERSION.startswith("1.0"), reason="compares with version 1.0, the Preview rules")
@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine"])
@pytest.mark.parametrize("options", [{}, {"fps": 3.3}, {"nframes": 7}, {"total_pixels": 784 * 1200}, {"max_frames": 9}])
def test_preview_pixels(name, options):
    video, fps = reference.fetch_video({"video": str(clip(f"{name}.mp4")), **options}, return_video_sample_fps=True)
    item = load(name, MediaSettings("preview", 3136, 1_003_520), options)
    assert np.array_equal(item.groups[0], video.permute(0, 2, 3, 1).numpy())
    assert item.seconds_per_grid == 1 / fps


@pytest.mark.skipif(not VERSION.startswith("1.5"), reason="compares with version 1.5, the slow and fast rules")
@pytest.mark.parametrize("name", ["bikes", "bigbuckbunny", "carphone_pristine"])
@pytest.mark.parametrize("options", [{}, {"fps": 8.0}, {"min_frame_similarity": 0.999}, {"max_frames": 7}])
def test_slow_fast_types_and_sizes(name, options):
    _, found = reference.fetch_video({"video": str(clip(f"{name}.mp4")), **options})
    item = load(name, MediaSettings("1.5", 3136, 1_003_520, video=VideoPolicy.slow_fast()), options)
    assert list(item.frame_types) == found["frame_types"].tolist()
    sizes = {0: (found["height"], found["width"]), 1: (found["fast_height"], found["fast_width"])}
    assert [g.shape[1:3] for g in item.groups] == [sizes[kind] for kind in item.frame_types]
    assert np.array_equal(np.float32(item.timestamps), found["timestamps"].numpy())


def test_hsv_is_opencvs():
    import cv2

    rgb = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    for frame in (rgb, rgb // 9, rgb // 2 + 128):
        expected = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).transpose(2, 0, 1).reshape(1, -1)
        assert np.array_equal(ops.hsv_patches(torch.from_numpy(frame), 512), expected)
