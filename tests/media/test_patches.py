"""Patch order and normalisation, and keys that tell different contents apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kvkeye.media.patches import MediaKey, patchify

HALF = (0.5, 0.5, 0.5)


def test_order_is_channel_row_column_over_raster_patches():
    rng = np.random.default_rng(0)
    groups = [rng.integers(0, 256, (1, 28, 42, 3), np.uint8), rng.integers(0, 256, (2, 14, 28, 3), np.uint8)]
    out = patchify(groups, 14, HALF, (0.5, 0.25, 0.125))
    assert out.shape == (6 + 4, 588) and out.dtype == torch.float32
    row = 0
    for group in groups:
        for frame in group:
            for i in range(frame.shape[0] // 14):
                for j in range(frame.shape[1] // 14):
                    patch = frame[14 * i : 14 * i + 14, 14 * j : 14 * j + 14].astype(np.float32) / 255
                    patch = (patch - np.float32(0.5)) / np.array([0.5, 0.25, 0.125], np.float32)
                    assert np.array_equal(out[row].numpy(), patch.transpose(2, 0, 1).reshape(-1))
                    row += 1


def test_packing_resizes_on_the_way():
    """Stacks of several frames and sizes; the same rows as resizing first. bf16 is fp32 rounded."""
    rng = np.random.default_rng(1)
    groups = [rng.integers(0, 256, (2, 40, 30, 3), np.uint8), rng.integers(0, 256, (1, 28, 42, 3), np.uint8)]
    sizes = [(28, 56), (28, 42)]
    first = np.stack([np.asarray(Image.fromarray(f).resize((56, 28), Image.Resampling.BICUBIC)) for f in groups[0]])
    expected = patchify([first, groups[1]], 14, HALF, HALF)
    assert torch.equal(patchify(groups, 14, HALF, HALF, sizes), expected)
    assert torch.equal(patchify(groups, 14, HALF, HALF, sizes, torch.bfloat16), expected.bfloat16())


def test_a_convolution_sees_the_same_picture():
    """Rows times the flattened kernel equal a stride-14 convolution of the normalised picture."""
    frame = np.random.default_rng(2).integers(0, 256, (1, 56, 84, 3), np.uint8)
    weight = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = (torch.from_numpy(frame).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    expected = torch.nn.functional.conv2d(image, weight, stride=14)[0].flatten(1).T  # [24, 5]
    got = patchify([frame], 14, HALF, HALF).double() @ weight.flatten(1).T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def key(*values):
    digest = MediaKey()
    for value in values:
        digest.add(value)
    return digest.digest()


def test_keys_tell_shapes_types_and_orders_apart():
    flat = np.arange(3000 * 3, dtype=np.uint32).astype(np.uint8)
    rgb = flat.reshape(30, 100, 3)
    values = [
        (rgb,), (flat.reshape(100, 30, 3),), (rgb[..., ::-1],), (flat,), (bytes(flat),), (rgb, 1), (rgb, "1"),
        (rgb, True), (rgb, 1.0), (rgb, None), (rgb, b"1"), (rgb, [1]), (rgb, []), (rgb, [1, 2]), (rgb, 1, 2),
        (rgb, [[1], 2]), (rgb, "ab", "c"), (rgb, "a", "bc"), (rgb, "abc"),
    ]  # fmt: skip
    assert len({key(*v) for v in values}) == len(values)
    assert key(rgb[::-1][::-1]) == key(rgb) == key(np.ascontiguousarray(rgb))
    with pytest.raises(TypeError, match="uint8"):
        key(rgb.astype(np.int16))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.binary(max_size=3))
fields = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(fields, max_size=4), st.lists(fields, max_size=4))
def test_equal_keys_mean_equal_fields(a, b):
    assert (key(*a) == key(*b)) == (repr(a) == repr(b))
