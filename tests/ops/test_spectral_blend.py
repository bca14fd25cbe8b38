"""The C++ transform behind spectral_blend, beside torch.fft in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.errors import UnsupportedError
from kvkeye.testing.case import Sample

CUTOFFS = (0.4, 0.3)  # space, time


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    if (reason := ops.OPS["spectral_blend"].implementations["cpp"].absent()) is not None:
        pytest.skip(reason)
    with ops.use_backends("cpp"):
        yield


def filtered(x: Tensor, order: int) -> Tensor:
    """All of the complex spectrum times 1 / (1 + d^order) or exp(-d / 2), every frequency looked up by itself."""
    space, time = CUTOFFS
    f_t, f_h, f_w = (2 * torch.fft.fftfreq(size, dtype=torch.float64) for size in x.shape[-3:])
    d = (f_t / time).square()[:, None, None] + (f_h / space).square()[:, None] + (f_w / space).square()
    mask = 1 / (1 + d**order) if order else torch.exp(-d / 2)
    return torch.fft.ifftn(torch.fft.fftn(x.double(), dim=(-3, -2, -1)) * mask, dim=(-3, -2, -1)).real


def low_pass(x: Tensor, order: int) -> Tensor:
    filtered: Tensor = ops.spectral_blend(x, torch.zeros_like(x), *CUTOFFS, order)
    return filtered


def assert_filtered(shape: tuple[int, ...], order: int) -> None:
    x = Sample(torch.float32, seed=sum(shape))(*shape)
    truth = filtered(x, order)
    assert (low_pass(x, order) - truth).abs().max() <= 8 * 2**-24 * x.abs().max(), (shape, order)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [0, 1, 4])
def test_every_length(axis: int, order: int) -> None:
    """Each frequency has a gain of its own, so one taken for another shows. Lengths with every prime below 64."""
    for size in range(1, 65):
        shape = [3, 5, 2]
        shape[axis] = size
        assert_filtered(tuple(shape), order)


@pytest.mark.parametrize(
    "shape", [(2, 21, 30, 52), (1, 13, 45, 40), (1, 96, 81, 25), (1, 1, 1, 3721), (4, 128, 2, 17), (1, 2, 343, 33)]
)
def test_composite_lengths(shape: tuple[int, ...]) -> None:
    """Twice and three times one factor, sizes above and below whole vectors, strips that end inside a plane."""
    for order in (0, 3):
        assert_filtered(shape, order)


def test_a_constant_stays_and_a_wave_beyond_the_cut_goes() -> None:
    shape = (12, 18, 20)
    flat = torch.full(shape, 3.25)
    assert (low_pass(flat, 4) - flat).abs().max() < 2e-6
    checks = torch.tensor([1.0, -1.0]).repeat(12 * 18 * 20 // 2).view(shape)  # the highest frequency of a row
    assert low_pass(checks, 40).abs().max() < 1e-6


def test_linear_and_symmetric() -> None:
    sample = Sample(torch.float32, seed=1)
    x, y = sample(2, 15, 14, 22), sample(2, 15, 14, 22)
    together = low_pass(2 * x - y, 4)
    assert (together - (2 * low_pass(x, 4) - low_pass(y, 4))).abs().max() < 4e-6
    left, right = (low_pass(x, 4).double() * y).sum(), (x.double() * low_pass(y, 4)).sum()
    assert abs(float(left - right)) < 1e-4 * float(x.norm())


def test_gradient_is_the_filter() -> None:
    sample = Sample(torch.float32, seed=2)
    low, high, upstream = (sample(2, 9, 14, 11) for _ in range(3))
    low.requires_grad_(), high.requires_grad_()
    out = ops.spectral_blend(low, high, *CUTOFFS, 4)
    grad_low, grad_high = torch.autograd.grad(out, (low, high), upstream)
    truth = filtered(upstream, 4)
    assert (grad_low - truth).abs().max() < 2e-6
    assert (grad_high - (upstream - truth)).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_do_not_meet(dtype: torch.dtype) -> None:
    """Each has the bits it has alone, whatever lies beside it: a huge one, an infinity, a NaN."""
    sample = Sample(dtype, seed=3)
    low, high = sample(4, 7, 10, 18), sample(4, 7, 10, 18)
    low[0] *= 1e20
    low[2, 3, 4, 5], high[3, 0, 0, 0] = float("inf"), float("nan")
    together = ops.spectral_blend(low, high, *CUTOFFS, 4)
    alone = ops.spectral_blend(low[1], high[1], *CUTOFFS, 4)
    assert torch.equal(together[1], alone)
    assert together[0].isfinite().all()
    assert not together[2].isfinite().any() and together[3].isnan().all()


@pytest.mark.parametrize("videos", [2, 9])
def test_threads_change_no_bit(videos: int) -> None:
    """Few videos are shared out in strips, the last of which lie half beyond the plane; many as wholes."""
    sample = Sample(torch.float32, seed=5)
    low, high = sample(videos, 32, 30, 33), sample(videos, 32, 30, 33)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.spectral_blend(low, high, *CUTOFFS, 4)
        for threads in (2, 3, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.spectral_blend(low, high, *CUTOFFS, 4), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "axis"), [((67, 2, 2), "T = 67"), ((2, 134, 2), "h = 134"), ((2, 2, 5183), "w = 5183")]
)
def test_large_primes_are_left_to_torch(shape: tuple[int, ...], axis: str) -> None:
    x = torch.ones(shape)
    with pytest.raises(UnsupportedError, match=f"{axis} has a prime factor above 64"):
        ops.spectral_blend(x, x, *CUTOFFS, 4)
    with ops.use_backends("cpp,eager"):
        assert (ops.spectral_blend(x, x, *CUTOFFS, 4) - x).abs().max() < 1e-6


def test_gains_that_overflow_are_zero() -> None:
    x = Sample(torch.float32, seed=4)(5, 6, 7)
    out = ops.spectral_blend(x, torch.zeros_like(x), 1e-30, 1e-30, 1000)
    assert (out - x.double().mean()).abs().max() < 1e-6
