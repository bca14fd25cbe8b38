"""Both projectors: Preview against PaddleOCR-VL's, 1.5 against the formula."""

from __future__ import annotations

import math

import pytest
import torch

from kvkeye.models.keye.positions import MediaGrid
from kvkeye.testing.tiny import tiny_keye_model
from tests.models import references

ITEMS = [MediaGrid("image", (1, 4, 6)), MediaGrid("video", (3, 2, 8), 0.5)]


@torch.no_grad()
def test_preview_normalises_patches(backend):
    model = tiny_keye_model("preview")
    features = torch.randn(72, 144) * 3 + 1
    expected = references.projector(model)(features, references.grid_tensor(ITEMS))
    torch.testing.assert_close(model.projector(features, ITEMS), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_1_5_normalises_windows(backend):
    projector = tiny_keye_model("1.5").projector
    features = torch.randn(72, 144) * 3 + 1
    windows = []
    for start, (frames, rows, columns) in ((0, (1, 4, 6)), (24, (3, 2, 8))):
        for frame in range(frames):
            for i in range(rows // 2):
                for j in range(columns // 2):
                    first = start + frame * rows * columns + 2 * i * columns + 2 * j
                    windows.append(features[[first, first + 1, first + columns, first + columns + 1]].flatten())
    x = torch.stack(windows).double()
    x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
    x = x * projector.pre_norm.weight + projector.pre_norm.bias
    x = x @ projector.linear_1.weight.double().T + projector.linear_1.bias
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    expected = x @ projector.linear_2.weight.double().T + projector.linear_2.bias
    torch.testing.assert_close(projector(features, ITEMS), expected.float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_small_features_meet_the_right_epsilon(backend):
    # At a variance of 1e-5 the two epsilons in the family, 1e-5 and 1e-6, differ by a third.
    model = tiny_keye_model("preview")
    features = torch.randn(24, 144) * 10**-2.5
    expected = references.projector(model)(features, references.grid_tensor(ITEMS[:1]))
    torch.testing.assert_close(model.projector(features, ITEMS[:1]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 3)])
def test_odd_grids_are_refused(grid):
    with pytest.raises(ValueError, match="multiple of merge = 2"):
        tiny_keye_model().projector(torch.randn(12, 144), [MediaGrid("image", grid)])
