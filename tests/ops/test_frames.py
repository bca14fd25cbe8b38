"""Colours of frames against OpenCV's published values and formula."""

import numpy as np
import torch

from kvkeye import ops


def hsv(rgb):
    """[pixels, 3], through patches of one pixel."""
    return ops.hsv_patches(torch.from_numpy(np.asarray(rgb, np.uint8)).view(1, -1, 3), 1).numpy()


def test_hsv_of_known_colours():
    """OpenCV's 8-bit convention; the second row was computed with OpenCV 5.0."""
    found = hsv([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255]])
    assert found.tolist() == [[0, 255, 255], [60, 255, 255], [120, 255, 255], [0, 0, 0], [0, 0, 255]]
    found = hsv([[12, 200, 77], [250, 3, 128], [31, 30, 29], [254, 255, 1], [90, 90, 91]])
    assert found.tolist() == [[70, 240, 200], [165, 252, 250], [15, 16, 31], [30, 254, 255], [120, 3, 91]]


def test_hsv_of_every_third_colour():
    """Against the published formula in whole numbers; all 86 x 86 x 86 colours."""
    rgb = np.stack(np.meshgrid(*[np.arange(0, 256, 3)] * 3), -1).reshape(-1, 3)
    red, green, blue = rgb.T
    value, spread = rgb.max(-1), rgb.max(-1) - rgb.min(-1)
    sector = np.where(value == red, green - blue, np.where(value == green, blue - red, red - green))
    sector = sector + np.where(value == red, 0, np.where(value == green, 2 * spread, 4 * spread))
    with np.errstate(divide="ignore", invalid="ignore"):
        saturation = (spread * np.where(value, np.rint(4096 * 255 / value), 0) + 2048) // 4096
        hue = (sector * np.where(spread, np.rint(4096 * 30 / spread), 0) + 2048) // 4096
    expected = np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], -1)
    side = 28 * 28
    for size, shape in ((1, (1, -1, 3)), (side, (side, side, 3))):
        part = rgb[: side * side].astype(np.uint8)
        found = ops.hsv_patches(torch.from_numpy(part).view(*shape), size)
        found = found if size == 1 else found.view(3, -1).t()
        assert np.array_equal(found.numpy(), expected[: side * side])
    assert np.array_equal(hsv(rgb), expected)
