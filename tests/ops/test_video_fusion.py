"""Long-video ops: properties, and agreement with the published formulas written out independently."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import Op
from kvkeye.testing.case import Sample
from kvkeye.testing.cases.video_fusion import plan


@pytest.fixture(params=["eager", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and (reason := ops.OPS["fuse_tiles"].implementations["cpp"].absent()) is not None:
        pytest.skip(reason)
    return str(request.param)


def tiled(seed: int, starts: list[int], length: int, frames: int, dtype: torch.dtype = torch.float32) -> tuple:
    sample = Sample(dtype, seed=seed)
    outputs = sample(2, len(starts), 3, length, 5, 7)
    return outputs, *plan(sample, starts, length, frames), sample.fp32(3, frames, 5, 7)


def published_step(outputs: Tensor, starts: Tensor, window: Tensor, latent: Tensor, c: float, dsigma: float) -> Tensor:
    """Sum of weighted tiles over sum of weights, guidance first, Euler last: A.4 and E.1, in fp64."""
    acc, weight = torch.zeros_like(latent, dtype=torch.float64), torch.zeros(latent.shape[1], dtype=torch.float64)
    u, p = outputs.double()
    for k, start in enumerate(starts.tolist()):
        for i, w in enumerate(window.double().tolist()):
            frame = (start + i) % latent.shape[1]
            acc[:, frame] += w * (u[k, :, i] + c * (p[k, :, i] - u[k, :, i]))
            weight[frame] += w
    return latent.double() + dsigma * acc / weight[:, None, None]


@pytest.mark.parametrize(("starts", "frames"), [([0, 2, 4, 6, 8], 14), ([0, 3, 6, 9, 12], 15), ([5, 0, 3], 11)])
def test_a_fused_step_is_the_published_one(backend: str, starts: list[int], frames: int) -> None:
    length = 6
    outputs, places, weights, latent = tiled(1, starts, length, frames)
    window = torch.sin(math.pi * (torch.arange(length) + 0.5) / length)
    with ops.use_backends(backend):
        stepped = ops.fuse_tiles(outputs, places, weights, latent, 5.5, -0.125)
    truth = published_step(outputs, places, window, latent, 5.5, -0.125)
    assert (stepped.double() - truth).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_order_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    outputs, starts, weights, latent = tiled(2, [1, 4, 7, 9, 12], 6, 13, dtype)
    with ops.use_backends(backend):
        stepped = ops.fuse_tiles(outputs, starts, weights, latent, 2.5, -0.1)
        for seed in range(4):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
            given = (outputs[:, order], starts[order], weights[order])
            assert torch.equal(ops.fuse_tiles(*given, latent, 2.5, -0.1), stepped)
            assert torch.equal(ops.blend_tiles(*given, 13, 2.5), ops.blend_tiles(outputs, starts, weights, 13, 2.5))


def test_tile_order_changes_no_bit_of_attention() -> None:
    sample = Sample(torch.bfloat16, seed=13)
    q, k, v = (sample(1, 13 * 4 + 3, 2, 16) for _ in range(3))
    starts, weights = plan(sample, [1, 4, 7, 9, 12], 6, 13)
    o, _ = ops.tile_attention(q, k, v, starts, weights, 13, 3, 0.25)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(ops.tile_attention(q, k, v, starts[order], weights[order], 13, 3, 0.25)[0], o)


def test_one_tile_is_plain_attention() -> None:
    sample = Sample(torch.float32, seed=14)
    q, k, v = (sample(2, 30, 3, 64) for _ in range(3))
    o, lse = ops.tile_attention(q, k, v, torch.zeros(1).int(), torch.ones(1, 6), 6, 0, 0.125)
    bounds = torch.tensor([0, 30, 60], dtype=torch.int32)
    plain, plain_lse = ops.varlen_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, 30, False, 0.125)
    assert (o.flatten(0, 1) - plain).abs().max() < 1e-6
    assert (lse.transpose(1, 2).flatten(0, 1) - plain_lse).abs().max() < 1e-6


def test_tiles_that_agree_fuse_to_what_they_agree_on(backend: str) -> None:
    """A model that looks at single frames: any tiling gives the plain output."""
    whole = torch.randn(3, 13, 5, 7, generator=torch.Generator().manual_seed(3))
    _, starts, weights, _ = tiled(3, [0, 2, 5, 7], 6, 13)
    frames = ops.tile_frames(starts, 6, 13)
    tiles = whole[:, frames].transpose(0, 1)[None]  # [1, J, C, n, h, w]
    with ops.use_backends(backend):
        fused = ops.blend_tiles(tiles, starts, weights, 13, 1.0)
    assert (fused - whole).abs().max() < 1e-6


def test_one_tile_of_weight_one_is_the_plain_step_to_the_bit(backend: str) -> None:
    sample = Sample(torch.bfloat16, seed=4)
    output, latent = sample(1, 1, 4, 9, 6, 10), sample.fp32(4, 9, 6, 10)
    with ops.use_backends(backend):
        stepped = ops.fuse_tiles(output, torch.zeros(1, dtype=torch.int32), torch.ones(1, 9), latent, 1.0, -0.0625)
    assert torch.equal(stepped, latent + -0.0625 * output[0, 0].float())


@pytest.mark.parametrize("seed", range(8))
def test_weights_sum_to_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(2, 20, (), generator=generator))
    hop = int(torch.randint(1, length + 1, (), generator=generator))
    frames = length + int(torch.randint(0, 60, (), generator=generator))
    starts = torch.tensor([*range(0, frames - length, hop), frames - length], dtype=torch.int32)
    windows = torch.rand(len(starts), length, generator=generator, dtype=torch.float64) + 1e-3
    weights = ops.normalized_tile_weights(windows, starts, frames)
    sums = torch.zeros(frames, dtype=torch.float64)
    sums.index_add_(0, ops.tile_frames(starts, length, frames).flatten(), weights.flatten())
    assert (sums - 1).abs().max() < 1e-15


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="frame 0 sum to zero"):
        ops.normalized_tile_weights(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([0], dtype=torch.int32), 4)


def blended_sdpa(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, frames: int, text: int) -> Tensor:
    """Attention per tile by PyTorch, blended; text attends to everything. [B, S, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    per_frame = (q.shape[2] - text) // frames
    out = torch.zeros_like(q)
    for j, start in enumerate(starts.tolist()):
        for i, w in enumerate(weights[j].tolist()):
            rows = torch.arange(per_frame) + (start + i) % frames * per_frame
            seen = [(start + n) % frames * per_frame + p for n in range(weights.shape[1]) for p in range(per_frame)]
            seen += range(frames * per_frame, q.shape[2])
            out[:, :, rows] += w * F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen])
    out[:, :, q.shape[2] - text :] = F.scaled_dot_product_attention(q[:, :, q.shape[2] - text :], k, v)
    return out.transpose(1, 2)


ATTENTION = [([0, 2, 4, 6], 8, 14, 0), ([0, 3], 4, 7, 3), ([1, 3, 5, 7, 9], 4, 10, 5), ([0, 1, 2, 3, 4], 6, 10, 2)]


@pytest.mark.parametrize(("starts", "length", "frames", "text"), ATTENTION)
def test_tile_attention_is_attention_per_tile_blended(starts: list[int], length: int, frames: int, text: int) -> None:
    """Forward and gradients of the eager form, float64."""
    sample = Sample(torch.float64, seed=5)
    q, k, v = (sample(2, frames * 3 + text, 2, 16).requires_grad_() for _ in range(3))
    places, weights = plan(sample, starts, length, frames)
    o, _ = ops.tile_attention(q, k, v, places, weights.double(), frames, text, 0.25)
    truth = blended_sdpa(q, k, v, places, weights.double(), frames, text)
    upstream = sample(*o.shape)
    assert (o - truth).abs().max() < 1e-12
    own = torch.autograd.grad(o, (q, k, v), upstream)
    for mine, theirs in zip(own, torch.autograd.grad(truth, (q, k, v), upstream)):
        assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize(("starts", "length", "frames", "text"), ATTENTION)
def test_shared_scores_give_tile_attention_and_its_gradients(
    starts: list[int], length: int, frames: int, text: int
) -> None:
    """The algebra of the kernels in float64: one coefficient per query and run of keys instead of one pass per tile."""
    sample = Sample(torch.float64, seed=6)
    per_frame, scale = 3, 0.25
    q, k, v = (sample(1, frames * per_frame + text, 1, 16) for _ in range(3))
    places, weights = plan(sample, starts, length, frames)
    weights = weights.double()
    args = (q, k, v, places, weights, frames, text, scale)
    o, lse = ops.tile_attention(*args)
    grad_o, grad_lse = sample(*o.shape), sample(*lse.shape)
    expected = ops.tile_attention_backward(grad_o, grad_lse, *args, lse)
    tokens, tiles = q.shape[1], len(starts)
    member = torch.zeros(tiles, tokens, dtype=torch.bool)  # keys of a tile
    share, slope_lse = torch.zeros(tiles + 1, tokens).double(), torch.zeros(tiles + 1, tokens).double()
    for j, run in enumerate(ops.tile_frames(places, length, frames).tolist()):
        for i, frame in enumerate(run):
            rows = slice(frame * per_frame, (frame + 1) * per_frame)
            member[j, rows], share[j, rows] = True, weights[j, i]
            slope_lse[j, rows] = grad_lse[0, 0, (j * length + i) * per_frame :][:per_frame]
    member[:, frames * per_frame :] = True
    queries = member.clone()
    queries[:, frames * per_frame :] = False
    member = torch.cat((member, torch.ones(1, tokens, dtype=torch.bool)))  # the tile of text queries: everything
    queries = torch.cat((queries, (torch.arange(tokens) >= frames * per_frame)[None]))
    share[-1, frames * per_frame :] = 1
    if text:
        slope_lse[-1, frames * per_frame :] = grad_lse[0, 0, -text:]
    s = scale * q[0, :, 0] @ k[0, :, 0].T
    pairs = queries[:, :, None] & member[:, None]  # [tile, query, key]
    denominators = torch.where(pairs, s, -torch.inf).logsumexp(-1)  # L_ij
    inverse = torch.where(queries, torch.exp(-denominators), 0.0)
    c = torch.einsum("jq,jqk->qk", share * inverse, pairs.double())
    assert ((c * s.exp()) @ v[0, :, 0] - o[0, :, 0]).abs().max() < 1e-12
    g = grad_o[0, :, 0] @ v[0, :, 0].T
    delta = torch.einsum("jqk,qk,jq->jq", pairs.double(), s.exp() * g, inverse)
    beta = torch.einsum("jq,jqk->qk", (share * delta - slope_lse) * inverse, pairs.double())
    ds = s.exp() * (c * g - beta)
    found = (scale * ds @ k[0, :, 0], scale * ds.T @ q[0, :, 0], (c * s.exp()).T @ grad_o[0, :, 0])
    for mine, theirs in zip(found, expected):
        assert (mine - theirs[0, :, 0]).abs().max() < 1e-12
    rows = ops.tile_frames(places, length, frames)[..., None] * per_frame + torch.arange(per_frame)
    found_weights = delta[torch.arange(tiles)[:, None, None], rows].sum(-1)
    assert (found_weights - expected[3]).abs().max() < 1e-12


def three_transforms(low: Tensor, high: Tensor, cutoff: float, order: int) -> Tensor:
    """The published form: both spectra, centred, masked on a grid in [-1, 1), summed, transformed back. Even sizes."""
    axes = (-3, -2, -1)
    grids = torch.meshgrid(*(2 * torch.arange(n).double() / n - 1 for n in low.shape[-3:]), indexing="ij")
    distance = sum(g.square() for g in grids) / cutoff**2
    mask = 1 / (1 + distance**order) if order else torch.exp(-0.5 * distance)
    spectra = [torch.fft.fftshift(torch.fft.fftn(x, dim=axes), dim=axes) for x in (low, high)]
    mixed = torch.fft.ifftshift(spectra[0] * mask + spectra[1] * (1 - mask), dim=axes)
    return torch.fft.ifftn(mixed, dim=axes).real


@pytest.mark.parametrize("order", [0, 4])
def test_spectral_blend_is_the_form_of_three_transforms(backend: str, order: int) -> None:
    sample = Sample(torch.float32, seed=7)
    low, high = sample(3, 8, 10, 24), sample(3, 8, 10, 24)
    with ops.use_backends(backend):
        blended = ops.spectral_blend(low, high, 0.25, 0.25, order)
    assert (blended - three_transforms(low.double(), high.double(), 0.25, order)).abs().max() < 2e-6


@pytest.mark.parametrize("sizes", [(21, 5, 9), (21, 6, 8), (4, 7, 32)])
@pytest.mark.parametrize("order", [0, 4])
def test_filters_are_exact_for_odd_sizes(backend: str, sizes: tuple[int, int, int], order: int) -> None:
    """A constant stays, a wave is scaled by the mask's value, opposite waves alike (defect A.7 number 6)."""
    time = torch.arange(sizes[0], dtype=torch.float64)
    for harmonic in (0, 1, 2):
        f = 2 * harmonic / sizes[0]
        gain = 1 / (1 + (f / 0.3) ** 8) if order else math.exp(-0.5 * (f / 0.3) ** 2)
        for phase in (0.0, 1.1):
            wave = torch.cos(2 * math.pi * harmonic * time / sizes[0] + phase)[:, None, None].expand(sizes).float()
            with ops.use_backends(backend):
                low = ops.spectral_blend(wave, torch.zeros_like(wave), 0.25, 0.3, order)
            assert (low - gain * wave).abs().max() < 1e-5


def test_refresh_changes_high_frequencies_more_and_more() -> None:
    """Weights that grow over time act along time (defects A.7 numbers 2 and 3); the marginal stays N(0, 1)."""
    sample = Sample(torch.float32, seed=8)
    noise, fresh = sample(16, 64, 20, 32), sample(16, 64, 20, 32)
    w = 0.1 * torch.arange(64) / 63
    norm = (w.square() + (1 - w).square()).sqrt()
    refreshed = ops.spectral_refresh(noise, fresh, (1 - w) / norm, w / norm, 0.25, 0.25, 4)
    change = (refreshed - noise).square().mean((0, 2, 3)).sqrt().view(4, 16).mean(1)
    assert (change.diff() > 0.01).all()
    assert torch.equal(refreshed[:, 0].isclose(noise[:, 0], atol=1e-6), torch.ones(16, 20, 32, dtype=torch.bool))
    assert abs(float(refreshed.std()) - 1) < 0.01


def test_refresh_keeps_low_frequencies() -> None:
    sample = Sample(torch.float64, seed=9)
    noise, fresh = sample(2, 9, 6, 7), sample(2, 9, 6, 7)
    zero, one = torch.zeros(9).double(), torch.ones(9).double()
    swapped = ops.spectral_refresh(noise, fresh, zero, one, 0.4, 0.4, 2)
    assert (swapped - ops.spectral_blend(noise, fresh, 0.4, 0.4, 2)).abs().max() < 1e-12
    assert (ops.spectral_refresh(noise, fresh, one, zero, 0.4, 0.4, 2) - noise).abs().max() < 1e-14


def test_a_frozen_clip_is_most_similar_and_has_no_motion(backend: str) -> None:
    sample = Sample(torch.float32, seed=10)
    guide = sample.fp32(4, 12, 16)
    frozen = guide[None, :, None].expand(1, 4, 6, 12, 16)
    moving = torch.stack([guide.roll(t, 2) for t in range(6)], 1)[None] + 0.5
    x = torch.cat((frozen, moving)).contiguous()
    with ops.use_backends(f"{backend},eager"):
        similarity, motion, drift = ops.score_candidates(x, torch.zeros_like(x), 0.3, guide, 4)
    assert (similarity[0] - 1).abs().max() < 1e-6 and motion[0].max() == 0 and drift[0].max() < 1e-6
    assert similarity[1, 1:].max() < 0.99 and motion[1].min() > 0.1
    assert (drift[1] - 0.5).abs().max() < 1e-6


def test_scores_take_the_clean_prediction(backend: str) -> None:
    """x - sigma v of flow matching, whatever the noise level."""
    sample = Sample(torch.float32, seed=11)
    clean, noise, guide = sample(2, 4, 5, 8, 9), sample(2, 4, 5, 8, 9), sample.fp32(4, 8, 9)
    with ops.use_backends(f"{backend},eager"):
        plain = ops.score_candidates(clean, noise, 0.0, guide, 3)
        noisy = ops.score_candidates((1 - 0.8) * clean + 0.8 * noise, noise - clean, 0.8, guide, 3)
    for a, b in zip(plain, noisy):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("op", [ops.OPS["fuse_tiles"], ops.OPS["blend_tiles"]], ids=lambda op: op.name)
def test_a_frame_without_tiles(backend: str, op: Op) -> None:
    outputs, starts, weights, latent = tiled(12, [0, 5], 4, 13)
    rest = (latent, 2.0, 0.5) if op.name == "fuse_tiles" else (13, 2.0)
    with ops.use_backends(backend):
        out = op(outputs, starts, weights, *rest)
    expected = latent if op.name == "fuse_tiles" else torch.zeros_like(latent)
    for frame in (4, 9, 12):
        assert torch.equal(out[:, frame], expected[:, frame])
