"""Cases of the rotary family."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

_SECTIONS = [16, 24, 24]


@cases("rope_2d")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, heads, dim in ((1, 1, 8), (5, 2, 72), (37, 3, 72)):
        angle = sample.fp32(tokens, dim // 2, scale=20.0)
        yield Case(f"T{tokens}_H{heads}_D{dim}", (sample(tokens, heads, dim), angle.cos(), angle.sin()))
    if sample.big:
        for tokens in (4096, 16384):  # the second one is larger than the caches
            angle = sample.fp32(tokens, 36, scale=20.0)
            x = sample(tokens, 16, 72)
            cost = Cost(bytes=2 * x.numel() * sample.itemsize)
            yield Case(f"T{tokens}_H16_D72", (x, angle.cos(), angle.sin()), cost, small=False, bench=True)
    angle = sample.fp32(4, 36)
    yield Bad("two_axes", (sample(4, 8), angle.cos(), angle.sin()), "expected [T, H, D]")
    yield Bad("short_table", (sample(4, 2, 72), angle[:3].cos(), angle[:3].sin()), "expected [4, 36]")


def _positions(sample: Sample, tokens: int) -> torch.Tensor:
    return sample.integers(0, 5000, 3, tokens)


@cases("mrope")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, heads, sections in ((1, 1, [1, 2, 1]), (5, 2, _SECTIONS), (33, 3, _SECTIONS), (4, 2, [64, 0, 0])):
        x = sample(tokens, heads, 2 * sum(sections))
        yield Case(f"T{tokens}_H{heads}_{sections}", (x, _positions(sample, tokens), sections, 1e6))
    if sample.big:
        for tokens in (1024, 4096):
            x = sample(tokens, 32, 128)
            cost = Cost(bytes=2 * x.numel() * sample.itemsize)
            args = (x, _positions(sample, tokens), _SECTIONS, 1e6)
            yield Case(f"T{tokens}_H32_D128", args, cost, small=False, bench=True)
    yield Bad("two_axes", (sample(4, 128), _positions(sample, 4), _SECTIONS, 1e6), "expected [T, H, D]")
    yield Bad("positions", (sample(4, 1, 128), _positions(sample, 3), _SECTIONS, 1e6), "expected int64 [3, 4]")
    yield Bad("sections", (sample(4, 1, 128), _positions(sample, 4), [16, 24], 1e6), "sum to half of D = 128")


@cases("qk_norm_mrope")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, num_q_heads, num_kv_heads in ((1, 1, 1), (5, 2, 1), (17, 4, 2)):
        yield Case(
            f"T{tokens}_{num_q_heads}q_{num_kv_heads}kv",
            (*_projection(sample, tokens, num_q_heads, num_kv_heads), _SECTIONS, 1e6, 1e-6, num_kv_heads),
        )
    if sample.big:
        for tokens in (1024, 4096):
            cost = Cost(bytes=2 * tokens * 40 * 128 * sample.itemsize)
            args = (*_projection(sample, tokens, 32, 8), _SECTIONS, 1e6, 1e-6, 8)
            yield Case(f"T{tokens}_32q_8kv", args, cost, small=False, bench=True)
    qkv, weight, other, positions = _projection(sample, 3, 2, 1)
    rest = (_SECTIONS, 1e6, 1e-6)
    yield Bad("width", (qkv[:, :-1], weight, other, positions, *rest, 1), "expected [T, (Hq + 2 x 1) x 128]")
    yield Bad("weights", (qkv, weight, other[:64], positions, *rest, 1), "both must be [D]")


def _projection(sample: Sample, tokens: int, num_q_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, ...]:
    width = (num_q_heads + 2 * num_kv_heads) * 128
    return sample(tokens, width), sample(128), sample(128), _positions(sample, tokens)
