"""Cases of the video_fusion family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from kvkeye.ops.video_fusion import normalized_tile_weights
from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


def plan(sample: Sample, starts: Sequence[int], length: int, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(starts, weights) with the sine window."""
    window = torch.sin(torch.pi * (torch.arange(length) + 0.5) / length)
    places = torch.tensor(starts, dtype=torch.int32)
    weights = normalized_tile_weights(window.expand(len(starts), length), places, num_frames)
    return places.to(sample.device), weights.float().to(sample.device)


Tiled = tuple[str, int, Sequence[int], tuple[int, int, int, int, int]]
#: (name, branches, starts, (C, n, T, h, w)): an overlap of one frame and of all but one, an irregular last tile in
#: shuffled order, tiles across the end of a loop, one tile that is the whole video, frames without a tile, no tile.
TILINGS: tuple[Tiled, ...] = (
    ("pairs", 1, (0, 3, 6), (2, 4, 10, 3, 5)),
    ("guided", 2, (6, 0, 4, 2, 7), (3, 4, 11, 4, 6)),
    ("looped", 2, (1, 4, 7, 10), (1, 5, 12, 1, 7)),
    ("negative_start", 1, (-2, 2), (2, 4, 8, 2, 9)),
    ("whole", 1, (0,), (2, 6, 6, 5, 13)),
    ("gap", 1, (5, 0), (2, 3, 9, 3, 3)),
    ("no_tiles", 2, (), (2, 3, 4, 2, 2)),
)


def _outputs(sample: Sample, tiling: Tiled) -> tuple[Any, ...]:
    _, branches, starts, (channels, length, frames, height, width) = tiling
    outputs = sample(branches, len(starts), channels, length, height, width)
    return outputs, *plan(sample, starts, length, frames)


def _long(sample: Sample) -> tuple[tuple[Any, ...], int]:
    """HunyuanVideo at 320 x 512, 445 pixel frames, tiles of 16 with overlap 12, and the bytes of its outputs."""
    outputs = sample(1, 25, 16, 16, 40, 64)
    return (outputs, *plan(sample, range(0, 97, 4), 16, 112)), outputs.numel() * sample.itemsize


@cases("blend_tiles")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tiling in TILINGS:
        yield Case(tiling[0], (*_outputs(sample, tiling), tiling[3][2], 1.0 if tiling[1] == 1 else 4.5))
    if sample.big:
        tiles, size = _long(sample)
        yield Case("320p_T112", (*tiles, 112, 1.0), Cost(bytes=size + 4 * 16 * 112 * 2560), small=False, bench=True)
    outputs, starts, weights = _outputs(sample, TILINGS[1])
    yield Bad("branches", (outputs[0], starts, weights, 11, 1.0), "with g = 1 or 2")
    yield Bad("guidance", (outputs[:1], starts, weights, 11, 2.0), "with one branch")
    yield Bad("starts", (outputs, starts.long(), weights, 11, 2.0), "expected int32 [5]")
    yield Bad("equal_starts", (outputs, starts - starts % 2, weights, 11, 2.0), "a start of its own")
    yield Bad("weights", (outputs, starts, weights[:, :3], 11, 2.0), "expected fp32 [5, 4]")
    yield Bad("short", (outputs, starts, weights, 3, 2.0), "longer than the video of 3")


@cases("fuse_tiles")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tiling in TILINGS:
        channels, _, frames, height, width = tiling[3]
        latent = sample.fp32(channels, frames, height, width)
        yield Case(tiling[0], (*_outputs(sample, tiling), latent, 1.0 if tiling[1] == 1 else 4.5, -0.25))
    if sample.big:
        tiles, size = _long(sample)
        latent = sample.fp32(16, 112, 40, 64)
        cost = Cost(bytes=size + 8 * latent.numel())
        yield Case("320p_T112", (*tiles, latent, 1.0, -0.03), cost, small=False, bench=True)
    outputs, starts, weights = _outputs(sample, TILINGS[1])
    latent = sample.fp32(3, 11, 4, 6)
    yield Bad("latent", (outputs, starts, weights, latent[:2], 2.0, 0.1), "latent is")
    yield Bad("latent_dtype", (outputs, starts, weights, latent.half(), 2.0, 0.1), "expected fp32 [C, T, h, w]")
    yield Bad("guidance", (outputs[:1], starts, weights, latent, 2.0, 0.1), "with one branch")


def _attention(
    sample: Sample, starts: Sequence[int], sizes: tuple[int, int, int, int], heads: int, dim: int, batch: int = 1
) -> tuple[Any, ...]:
    """sizes: frames of a tile, frames, tokens per frame, tokens of text."""
    length, frames, per_frame, text = sizes
    tokens = frames * per_frame + text
    q, k, v = (sample(batch, tokens, heads, dim) for _ in range(3))
    return q, k, v, *plan(sample, starts, length, frames), frames, text, dim**-0.5


@cases("tile_attention")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("pairs", _attention(sample, (0, 1), (2, 3, 3, 0), 2, 8))
    yield Case("looped", _attention(sample, (1, 3, 2), (3, 4, 2, 3), 1, 72))
    yield Case("text_only", _attention(sample, (), (1, 2, 0, 6), 1, 8))
    # Large for an interpreter.
    yield Case("batch", _attention(sample, (1, 0), (3, 6, 2, 5), 3, 16, batch=2), small=False)
    yield Case("m4", _attention(sample, (0, 2, 4, 6, 7), (8, 15, 5, 4), 2, 64), small=False)
    yield Case("one_tile", _attention(sample, (0,), (5, 5, 13, 0), 2, 24), small=False)
    yield Case("gap", _attention(sample, (5, 0), (3, 9, 2, 1), 1, 8), small=False)
    yield Case("blocks", _attention(sample, (0, 3, 6, 8), (6, 14, 37, 9), 1, 128), small=False)
    if sample.big:
        args = _attention(sample, (0, 2, 4, 6, 8), (8, 16, 32, 0), 2, 128)
        # Scores of each pair that shares a tile, once: 16 frames see 8, 10, 12, 14, 14, 14 ... frames.
        pairs = 2 * (8 + 8 + 10 + 10 + 12 + 12 + 14 + 14) * 32 * 32
        cost = Cost(bytes=4 * args[0].numel() * sample.itemsize, flops=4 * 2 * 128 * pairs)
        yield Case("m4_16x32_2h_D128", args, cost, small=False, bench=True)
    q, k, v, *rest = _attention(sample, (0, 2), (4, 6, 3, 2), 2, 8)
    yield Bad("shapes", (q, k[:, :3], v, *rest), "three times [B, S, H, D]")
    yield Bad("dtype", (q, k.double(), v, *rest), "one dtype is required")
    yield Bad("frames", (q, k, v, *rest[:2], 6, 1, 1.0), "are not 6 frames of equal size")
    yield Bad("axes", (q, k, v, rest[0], rest[1][0], 6, 2, 1.0), "expected [J, n]")
    yield Bad("starts", (q, k, v, rest[0] * 0, *rest[1:]), "a start of its own")


@cases("spectral_blend")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for shape in ((2, 4, 6, 8), (3, 5, 7, 9), (1, 1, 1), (2, 2, 21, 10, 33), (0, 3, 4, 5), (1, 2, 520), (2, 67, 3)):
        for order in (0, 4):
            name = "x".join(map(str, shape)) + ("_butterworth" if order else "_gaussian")
            yield Case(
                name,
                (sample(*shape), sample(*shape), 0.25, 0.3, order),
                must_accept=() if 67 in shape else ("cpp",),  # a large prime
            )
    if sample.big:
        low, high = sample(4, 21, 60, 104), sample(4, 21, 60, 104)
        cost = Cost(bytes=3 * low.numel() * sample.itemsize, flops=int(5 * math.log2(21 * 60 * 104) * low.numel()))
        yield Case("4x21x60x104", (low, high, 0.25, 0.25, 4), cost, small=False, bench=True)
    low, high = sample(2, 3, 4, 5), sample(2, 3, 4, 5)
    yield Bad("shapes", (low, high[:1], 0.25, 0.25, 0), "expected twice [..., T, h, w]")
    yield Bad("empty", (low[..., :0], high[..., :0], 0.25, 0.25, 0), "all must be at least 1")
    yield Bad("cutoff", (low, high, 0.0, 0.25, 0), "shares of the Nyquist frequency above 0")
    yield Bad("order", (low, high, 0.25, 0.25, -1), "expected 0 (Gaussian)")


@cases("spectral_refresh")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for shape in ((2, 4, 6, 8), (1, 2, 5, 7, 9), (1, 1, 1)):
        for order in (0, 4):
            frames = shape[-3]
            keep, gain = 1 - 0.1 * sample.fp32(frames).abs(), sample.fp32(frames)
            name = "x".join(map(str, shape)) + ("_butterworth" if order else "_gaussian")
            yield Case(name, (sample(*shape), sample(*shape), keep, gain, 0.25, 0.3, order))
    x, fresh, gains = sample(2, 3, 4, 5), sample(2, 3, 4, 5), sample.fp32(3)
    yield Bad("shapes", (x, fresh[:1], gains, gains, 0.25, 0.25, 4), "expected twice [..., T, h, w]")
    yield Bad("gains", (x, fresh, gains, sample.fp32(5), 0.25, 0.25, 4), "one value per frame")
