"""Fusion of tiles and blending of spectra, beside the tensor code of the published methods."""

from __future__ import annotations

import math

import torch
from _measure import Bar, Peer, Row
from torch import Tensor

from kvkeye import ops
from kvkeye.ops.video_fusion import low_pass


def _close(mine: Tensor, other: Tensor, allowed: float, what: str) -> None:
    gap = float((mine.float() - other.float()).abs().max())
    if not gap <= allowed:
        raise AssertionError(f"{what}: {gap:.2e} from the peer; allowed {allowed:.2e}")


def sine_plan(starts: list[int], length: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """(starts, normalised weights, window) of the sine window."""
    window = torch.sin(torch.pi * (torch.arange(length) + 0.5) / length)
    places = torch.tensor(starts, dtype=torch.int32)
    return places, ops.normalized_tile_weights(window.expand(len(starts), -1), places, frames).float(), window


def fuse_row(quick: bool) -> Row:
    """HunyuanVideo at 320 x 512, 445 pixel frames: 25 tiles of 16 latent frames with overlap 12, bf16 outputs."""
    channels, frames, height, width = (2, 32, 4, 8) if quick else (16, 112, 40, 64)
    length, hop, dsigma = 16, 4, -0.03
    generator = torch.Generator().manual_seed(0)
    starts, weights, window = sine_plan([*range(0, frames - length + 1, hop)], length, frames)
    shape = (1, len(starts), channels, length, height, width)
    outputs = torch.randn(shape, generator=generator).to(torch.bfloat16)
    latent = torch.randn(channels, frames, height, width, generator=generator)

    def published() -> Tensor:
        """Sums and weights in the model's dtype, one gather, clone, product and indexed sum per tile; then Euler."""
        total, count = torch.zeros_like(latent, dtype=torch.bfloat16), torch.zeros(frames, dtype=torch.bfloat16)
        share = window.to(torch.bfloat16)
        for tile, start in enumerate(starts.tolist()):
            places = list(range(start, start + length))
            latent[:, places].to(torch.bfloat16)  # what the model is given
            total[:, places] += outputs[0, tile].clone() * share[:, None, None]
            count[places] += share
        return latent + dsigma * (total / count[:, None, None]).float()

    size = outputs.numel() * 2 + latent.numel() * 8
    source = torch.empty(size // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    peers = [
        Peer("published tensor code", "bfloat16", published),
        Peer("torch copy_ of as many bytes", "", lambda: target.copy_(source)),
    ]
    return Row(
        f"fuse_tiles, {channels} x {frames} x {height} x {width}, {len(starts)} tiles of {length}, bf16 outputs", peers,
        [Bar("published tensor code", 1.0), Bar("torch copy_ of as many bytes", 0.5)],
        lambda: ops.fuse_tiles(outputs, starts, weights, latent, 1.0, dsigma),
        lambda made: _close(made[0], made[1], 0.03 * 4 * 2**-7, "fuse_tiles"), bytes=size,
    )  # fmt: skip


def blend_row(butterworth_order: int, quick: bool) -> Row:
    """The latent of 16 channels and 64 frames at 720 x 1280, fp32."""
    shape = (2, 8, 10, 12) if quick else (16, 64, 90, 160)
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn(shape, generator=generator) for _ in range(2))
    axes, cutoff = (-3, -2, -1), 0.25
    half = low_pass(shape[1:], cutoff, cutoff, butterworth_order, low.device).float()
    columns = torch.arange(shape[3])
    mask = torch.fft.fftshift(half[..., torch.minimum(columns, shape[3] - columns)])

    def three_transforms() -> Tensor:
        """Both spectra, centred, masked, summed, transformed back."""
        spectra = [torch.fft.fftshift(torch.fft.fftn(x, dim=axes), dim=axes) for x in (low, high)]
        mixed = torch.fft.ifftshift(spectra[0] * mask + spectra[1] * (1 - mask), dim=axes)
        return torch.fft.ifftn(mixed, dim=axes).real

    def one_filter() -> Tensor:
        return ops.spectral_blend.reference(low, high, cutoff, cutoff, butterworth_order)  # type: ignore[no-any-return]

    peers = [
        Peer("three complex FFTs", "", three_transforms),
        Peer("eager: one real FFT pair", "", one_filter),
    ]
    name = f"Butterworth of order {butterworth_order}" if butterworth_order else "Gaussian"
    flops = 5.0 * math.log2(math.prod(shape[1:])) * low.numel()  # a real transform pair, by the customary count
    return Row(
        f"spectral_blend, {' x '.join(map(str, shape))}, fp32, {name}", peers, [Bar("three complex FFTs", 8.0)],
        lambda: ops.spectral_blend(low, high, cutoff, cutoff, butterworth_order),
        lambda made: _close(made[0], made[1], 2e-5, "spectral_blend"), flops=flops, bytes=12 * low.numel(),
    )  # fmt: skip


def score_row(quick: bool) -> Row:
    """Five candidates of 81 pixel frames at 480 x 832, bf16 latents."""
    shape = (2, 2, 3, 8, 8) if quick else (5, 16, 21, 60, 104)
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    guide = torch.randn(shape[1], *shape[3:], generator=generator)
    return Row(
        f"score_candidates, {' x '.join(map(str, shape))}, bf16",
        [Peer("eager reference", "", lambda: ops.score_candidates.reference(x, v, 0.6, guide, 8))],
        [Bar("eager reference", 1.0)], lambda: ops.score_candidates(x, v, 0.6, guide, 8),
        lambda made: [_close(a, b, 1e-4, "score_candidates") for a, b in zip(*made)] and None,
        bytes=2 * x.numel() * 2,
    )  # fmt: skip
