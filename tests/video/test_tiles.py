"""The tile planner: cover, equal lengths, weights that sum to one, moving borders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeye.errors import ConfigError
from kvkeye.video.config import SCHEDULES, WINDOWS, KStepConfig, VideoMergeConfig
from kvkeye.video.tiles import num_static_tiles, plan_tiles, window_weights

LENGTHS = st.integers(2, 24).flatmap(
    lambda tile: st.tuples(st.integers(1, 90), st.just(tile), st.integers(0, tile - 1), st.integers(0, 40))
)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.sampled_from(SCHEDULES), st.sampled_from(WINDOWS))
def test_tiles_cover_the_clip_and_weights_sum_to_one_in_fp64(lengths, schedule, window):
    """Oracle (d), for random clip, tile and overlap."""
    num_frames, tile, overlap, step = lengths
    plan = plan_tiles(num_frames, tile, overlap, schedule, step)
    weights, frames = plan.weights(window), plan.frames()
    total = torch.zeros(num_frames, dtype=torch.float64).index_put_((frames,), weights, accumulate=True)
    assert weights.dtype == torch.float64 and (weights > 0).all()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-15 * len(plan.starts) + 1e-14)
    assert frames.shape == (len(plan.starts), min(tile, num_frames))
    assert all(len(set(row)) == len(row) for row in frames.tolist()), "a frame twice in a tile"
    assert len(set(plan.starts)) == len(plan.starts)
    if schedule == "static":
        assert num_static_tiles(num_frames, tile, overlap) == len(plan.starts)


def test_published_setting():
    """README example of the released code: 16 frames, 12 shared, 112 in all: 25 tiles, 3.57 passes per frame."""
    plan = plan_tiles(112, 16, 12)
    assert plan.starts == tuple(range(0, 97, 4)) and round(plan.recompute, 2) == 3.57
    share = plan.weights("sine")[10, 0]  # of a tile's first latent, four tiles deep
    assert round(float(share), 3) == 0.039


def test_effective_number_of_averaged_tiles():
    """Section A.4's figures: four tiles deep, hann averages 2.67 tiles everywhere and flat 4."""
    inner = slice(40, 72)
    for window, low, high in (("hann", 2.66, 2.68), ("flat", 4, 4), ("sine", 3.1, 3.45)):
        plan = plan_tiles(112, 16, 12)
        squares = torch.zeros(112, dtype=torch.float64)
        squares.index_put_((plan.frames(),), plan.weights(window).square(), accumulate=True)
        effective = 1 / squares[inner]
        assert effective.min() >= low - 1e-9 and effective.max() <= high + 1e-9, window


def test_windows_are_symmetric_and_differ():
    for name in ("sine", "pyramid", "hann", "flat"):
        weights = window_weights(name, 7)
        torch.testing.assert_close(weights, weights.flip(0), rtol=1e-15, atol=1e-15)
    assert window_weights("pyramid", 5).tolist() == [1, 2, 3, 2, 1]
    with pytest.raises(ConfigError, match="got 'kaiser'"):
        window_weights("kaiser", 5)


def test_overlap_linear_leaves_the_clips_ends_alone():
    weights = plan_tiles(10, 6, 2).weights("overlap-linear")
    assert weights[0, :4].tolist() == [1, 1, 1, 1] and weights[-1, -4:].tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(weights[1, :2], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))


def test_shifted_borders_move_and_looped_tiles_wrap():
    plans = [plan_tiles(40, 8, 0, "shifted", step) for step in range(4)]
    assert len({plan.starts for plan in plans}) == 4
    assert all(plan.starts[0] == 0 and plan.starts[-1] == 32 for plan in plans)
    assert max(plan.recompute for plan in plans) <= 1.2 + 1e-9
    looped = plan_tiles(20, 8, 4, "looped", 1)
    assert looped.looped and any(start + 8 > 20 for start in looped.starts)


def test_irregular_lengths_keep_every_tile_whole():
    """Defect A.7 #13: lengths that the hop does not divide."""
    plan = plan_tiles(21, 8, 4)
    assert plan.starts == (0, 4, 8, 12, 13) and plan.frames().shape == (5, 8)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"tile": 8, "overlap": 8}, "overlap smaller than the tile"),
        ({"tile": 1}, "tile: got 1"),
        ({"window": "box"}, "one of sine"),
        ({"schedule": "random"}, "one of static"),
        ({"mode": "pixel"}, "one of latent"),
        ({"refresh": 1.5}, "from 0 to 1"),
        ({"prompts": "one"}, "sequence of strings"),
        ({"tile_batch": 0}, "at least 1"),
        ({"mode": "attention", "anchor": True}, "Use mode='latent'"),
        ({"temporal_cutoff": 0.0}, "above 0"),
    ],
)
def test_unusable_settings_are_refused_in_a_sentence(settings, part):
    with pytest.raises(ConfigError, match=r"^VideoMergeConfig\.") as caught:
        VideoMergeConfig(**settings)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_candidates": 0}, "at least 1"),
        ({"search": "beam"}, "one of truncated"),
        ({"search": "coarse", "halving": (1, 2)}, "restarts its winner"),
        ({"halving": (2, 1)}, "ascending"),
        ({"color_anchor": -0.1}, "from 0 to 1"),
        ({"seed": 1.0}, "an integer"),
    ],
)
def test_unusable_searches_are_refused_in_a_sentence(settings, part):
    with pytest.raises(ConfigError, match=r"^KStepConfig\.") as caught:
        KStepConfig(**settings)
    assert part in str(caught.value)


def test_halving_rungs():
    assert KStepConfig(num_candidates=8, halving=(1, 2, 4)).rungs() == [(1, 4), (2, 2), (4, 1)]
    assert KStepConfig(num_candidates=5, k=3).rungs() == [(3, 1)]
