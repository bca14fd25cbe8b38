"""Long noise: oracle (g), and the defects of the published code, each avoided in a test named after it."""

from __future__ import annotations

import time

import pytest
import torch

from kvkeye.errors import ConfigError
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.noise import long_noise, refresh_weights, shuffled_sources

PUBLISHED = VideoMergeConfig()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def made(x: torch.Tensor, tile: int = 16, overlap: int = 12, seed: int = 0, **settings: object) -> torch.Tensor:
    return long_noise(x, tile, overlap, VideoMergeConfig(**settings), generator(seed))


@pytest.mark.parametrize(("num_frames", "tile", "hop"), [(112, 16, 4), (64, 16, 8), (48, 16, 16), (23, 7, 3)])
def test_repeated_blocks_are_equal_as_sets(num_frames, tile, hop):
    source = shuffled_sources(num_frames, tile, hop, generator())
    assert source[:tile].tolist() == list(range(tile))
    for first in range(tile, num_frames - hop + 1, hop):
        assert set(source[first : first + hop].tolist()) == set(source[first - tile : first - tile + hop].tolist())
    assert source[tile : tile + hop].sort().values.tolist() == list(range(hop))


def test_defect_13_tail_that_the_hop_does_not_divide():
    source = shuffled_sources(25, 8, 4, generator())
    assert source.shape == (25,) and int(source[24]) in source[16:20].tolist()


def test_marginals_are_standard_normal_and_the_change_grows_with_time():
    noise = normal(1, 16, 64, 24, 24)
    base, refreshed = made(noise, noise="freenoise"), made(noise)
    change = (refreshed - base).square().mean((0, 1, 3, 4)).sqrt().reshape(4, -1).mean(1)
    assert (change.diff() > 0.015).all() and 0.005 < float(change[0]) < 0.025 and 0.08 < float(change[3]) < 0.11
    for x in (base, refreshed, made(noise, refresh=1.0)):
        per_quarter = x.reshape(16, 4, -1)
        # Blocks repeat, so a quarter holds 16 frames of 9216 independent values; five standard errors.
        assert (per_quarter.std((0, 2)) - 1).abs().max() < 5 / (2 * 16 * 9216) ** 0.5 + 0.004
        assert per_quarter.mean((0, 2)).abs().max() < 5 / (16 * 9216) ** 0.5
    assert torch.equal(refreshed[:, :, :1], base[:, :, :1]), "the first frame has weight 0"


def test_same_generator_gives_the_same_tensor_and_another_does_not():
    noise = normal(2, 4, 24, 8, 8)
    first = made(noise, 8, 4)
    assert torch.equal(made(noise, 8, 4), first) and not torch.equal(made(noise, 8, 4, seed=1), first)


def test_defect_7_global_random_numbers_are_not_used():
    import random

    noise = normal(1, 4, 24, 8, 8)
    random.seed(1)
    torch.manual_seed(1)
    first = made(noise, 8, 4)
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(made(noise, 8, 4), first)


def test_each_clip_of_a_batch_depends_on_its_own_generator_alone():
    noise = normal(2, 4, 24, 8, 8)
    both = long_noise(noise, 8, 4, PUBLISHED, [generator(1), generator(2)])
    assert torch.equal(both[1:], long_noise(noise[1:], 8, 4, PUBLISHED, [generator(2)]))
    with pytest.raises(ConfigError, match="got 1 for a batch of 2"):
        long_noise(noise, 8, 4, PUBLISHED, [generator(1)])


def test_one_tile_leaves_the_noise_alone():
    noise = normal(1, 4, 16, 8, 8)
    longer = normal(1, 4, 32, 8, 8)
    assert made(noise) is noise and made(longer, noise="random") is longer


@pytest.mark.parametrize("width", [8, 12, 64])
def test_defect_2_weights_run_over_time_whatever_the_width(width):
    """The published weights ran over the width, and only where it equalled the length in frames."""
    noise = normal(1, 4, 64, 8, width)
    change = (made(noise, refresh=0.5) - made(noise, noise="freenoise")).square()
    over_time = change.mean((0, 1, 3, 4)).reshape(4, 16).mean(1)
    assert (over_time.diff() > 0).all()
    over_width = change.mean((0, 1, 2, 3))
    assert over_width.max() < 1.6 * over_width.min()


@pytest.mark.parametrize("num_frames", [20, 21])
def test_defects_3_and_6_real_noise_stays_real_for_even_and_odd_lengths(num_frames):
    """The whole refreshed noise against two complex transforms in fp64, whose imaginary parts vanish."""
    noise = normal(1, 2, num_frames, 9, 10)
    base = made(noise, 8, 4, noise="freenoise").double()
    draws = generator()
    shuffled_sources(num_frames, 8, 4, draws)
    fresh = torch.randn(noise.shape, generator=draws).double()
    t, h, w = (2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in noise.shape[2:])
    distance = t.square()[:, None, None] + h.square()[:, None] + w.square()
    high = 1 - 1 / (1 + (distance / 0.25**2) ** 4)

    def filtered(x):
        found = torch.fft.ifftn(torch.fft.fftn(x, dim=(2, 3, 4)) * high, dim=(2, 3, 4))
        assert found.imag.abs().max() < 1e-14
        return found.real

    keep, gain = (weights[:, None, None] for weights in refresh_weights(num_frames, 0.1))
    truth = base + (keep - 1) * filtered(base) + gain * filtered(fresh)
    torch.testing.assert_close(made(noise, 8, 4).double(), truth, rtol=0, atol=5e-6)


def test_defect_4_everything_is_built_where_the_latents_live():
    noise = torch.empty(1, 4, 24, 8, 8, device="meta")
    assert long_noise(noise, 8, 4, PUBLISHED, None).device.type == "meta"


def test_defect_5_a_clip_of_the_published_size_takes_no_python_loop():
    """112 x 40 x 64: the published triple loop alone needs a second, for a mask of the full size of the latents."""
    noise = normal(1, 1, 112, 40, 64)
    start = time.perf_counter()
    made(noise)
    assert time.perf_counter() - start < 0.7


def test_refresh_weights_of_the_published_setting():
    keep, add = refresh_weights(112, 0.1)
    assert (float(keep[0]), float(add[0])) == (1.0, 0.0)
    assert (round(float(keep[-1]), 3), round(float(add[-1]), 3)) == (0.994, 0.11)
    torch.testing.assert_close(keep.square() + add.square(), torch.ones(112, dtype=torch.float64))


def test_bf16_noise_keeps_its_dtype():
    assert made(normal(1, 4, 24, 8, 8).bfloat16(), 8, 4).dtype == torch.bfloat16
