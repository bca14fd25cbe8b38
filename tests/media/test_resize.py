"""The two size rules against the published table, and the two resamplers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from kvkeye.errors import MediaError
from kvkeye.media.resize import BicubicResizer, client_size, processor_size, resize_frame, resize_image

UTILS_1_5 = (3136, 16_056_320)
TABLE = [  # (h, w): client utilities 1.5.2; processor at min 3136; processor at min 102400
    ((1080, 1920), (1092, 1932), (728, 1316), (728, 1316)),
    ((720, 1280), (728, 1288), (728, 1288), (728, 1288)),
    ((480, 640), (476, 644), (476, 644), (476, 644)),
    ((448, 448), (448, 448), (448, 448), (448, 448)),
    ((224, 224), (224, 224), (224, 224), (336, 336)),
    ((42, 70), (56, 56), (56, 56), (252, 420)),
    ((3000, 4000), (2996, 4004), (840, 1148), (840, 1148)),
    ((100, 1000), (112, 1008), (112, 1008), (112, 1008)),
    ((9, 38), (28, 140), (28, 112), (168, 672)),
]


@pytest.mark.parametrize(("size", "client", "low", "high"), TABLE)
def test_table(size, client, low, high):
    assert client_size(*size, *UTILS_1_5) == client
    assert processor_size(*size, 3136, 1_003_520) == low
    assert processor_size(*size, 102_400, 1_003_520) == high


@pytest.mark.parametrize(("size", "both"), [(row[0], row[2]) for row in TABLE[:-1]] + [((9, 38), (28, 140))])
def test_client_1_0_then_processor(size, both):
    once = client_size(*size, 3136, 16384 * 784)
    assert processor_size(*once, 3136, 1_003_520) == both


def test_recorded_sizes():
    """Some hundred random sizes, as the published package answers them."""
    recorded = json.loads((Path(__file__).parent / "data" / "smart_resize.json").read_text())["rows"]
    assert len(recorded) > 300
    for height, width, low, high, *expected in recorded:
        assert client_size(height, width, low, high) == tuple(expected), (height, width, low, high)
        if min(height, width) >= 28 and min(expected) > 28:  # elsewhere the two rules differ
            assert processor_size(height, width, low, high) == tuple(expected)


def test_one_pixel_is_enlarged():
    assert processor_size(1, 1, 3136, 1_003_520) == (56, 56)
    assert processor_size(1, 1, 102_400, 1_003_520) == (336, 336)


@pytest.mark.parametrize("rule", [processor_size, client_size])
@pytest.mark.parametrize("size", [(1, 201), (20100, 100), (0, 5), (5, 0)])
def test_aspect_and_empty_sides_are_refused(rule, size):
    with pytest.raises(MediaError, match=r"aspect ratio of 201\.0|at least 1"):
        rule(*size, 3136, 1_003_520)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([3136, 102_400]))
def test_multiples_within_limits(height, width, low):
    if max(height, width) > 200 * min(height, width):
        return
    rows, columns = processor_size(height, width, low, 1_003_520)
    assert rows % 28 == columns % 28 == 0
    # A very long picture may end one step outside: each side is a whole number of steps.
    assert rows * columns >= low or min(rows, columns) == 28
    if min(height, width) >= 28:
        assert (rows, columns) == client_size(height, width, low, 1_003_520) or min(rows, columns) < 28


def test_image_resize_is_pillows():
    frame = np.random.default_rng(0).integers(0, 256, (37, 91, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(frame).resize((56, 84), Image.Resampling.BICUBIC))
    assert np.array_equal(resize_image(frame, (84, 56)), expected)
    assert resize_image(frame, (37, 91)) is frame


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_read_only_and_strided_pictures(resample):
    frame = np.asarray(Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)))
    assert not frame.flags.writeable
    expected = np.asarray(Image.fromarray(frame).resize((31, 29), resample))
    assert np.array_equal(resize_image(frame, (29, 31), int(resample)), expected)
    turned = frame.transpose(1, 0, 2)
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(turned)).resize((31, 29), resample))
    assert np.array_equal(resize_image(turned, (29, 31), int(resample)), expected)


@pytest.mark.parametrize(("mode", "rate"), [("bilinear", 0.2), ("bicubic", 1e-3)])
def test_frame_resize_is_antialiased_and_rounded(mode, rate):
    """Bicubic is rounded once, in single precision; bilinear after each pass, as the next test pins down."""
    noise = np.random.default_rng(1).integers(0, 256, (120, 100, 3), dtype=np.uint8)
    size = 56, 168  # rows shrink, columns grow
    small = resize_frame(noise, size) if mode == "bilinear" else BicubicResizer(120, 100, size)(noise)
    exact = np.einsum("or,rcx,pc->opx", filter_matrix(120, 56, mode), noise, filter_matrix(100, 168, mode))
    exact = exact.round().clip(0, 255)
    assert small.dtype == np.uint8 and small.flags.c_contiguous
    off = abs(small - exact)
    assert off.max() <= 1 and (off > 0).mean() < rate


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 120), st.integers(1, 120))
def test_bilinear_frames_are_torchs(height, width, rows, columns):
    frame = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
    expected = interpolate(planes, size=(rows, columns), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.array_equal(resize_frame(frame, (rows, columns)), expected.numpy())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 120), st.integers(1, 120))
def test_bicubic_frames_are_torchs(height, width, rows, columns):
    """Bit by bit, for each of several frames through the same buffers."""
    resize = BicubicResizer(height, width, (rows, columns))
    for frame in np.random.default_rng(4).integers(0, 256, (2, height, width, 3), dtype=np.uint8):
        planes = torch.from_numpy(frame).permute(2, 0, 1)[None].float()
        expected = interpolate(planes, size=(rows, columns), mode="bicubic", antialias=True).round().clamp(0, 255)
        assert np.array_equal(resize(frame), expected[0].permute(1, 2, 0).numpy())


def filter_matrix(size_in, size_out, mode):
    """Antialiased triangle or cubic (a = -0.5) filter as a dense matrix [size_out, size_in] in double precision."""
    scale = size_in / size_out
    width = max(scale, 1.0)
    centers = (np.arange(size_out) + 0.5) * scale
    x = abs((np.arange(size_in)[None] + 0.5 - centers[:, None]) / width)
    if mode == "bilinear":
        weights = np.clip(1 - x, 0, None)
    else:
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)
