"""Cases of the KV cache family."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

_SECTIONS = [16, 24, 24]


def _slots(sample: Sample, tokens: int, num_slots: int) -> torch.Tensor:
    slots = sample.permutation(num_slots)[:tokens].clone()
    if tokens > 2:
        slots[1] = -1
    return slots


@cases("append_kv")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, heads, block_size, dim in ((1, 1, 1, 8), (5, 2, 8, 72), (33, 1, 32, 128)):
        cache = sample(9, heads, block_size, dim)
        k, v = sample(tokens, heads, dim), sample(tokens, heads, dim)
        yield Case(f"T{tokens}_P{block_size}", (k, v, cache, cache * 2, _slots(sample, tokens, 9 * block_size)))
    if sample.big:
        for tokens in (1024, 8192):  # the second one is larger than the caches
            cache = sample(tokens // 16, 8, 32, 128)
            k, v = sample(tokens, 8, 128), sample(tokens, 8, 128)
            cost = Cost(bytes=4 * k.numel() * sample.itemsize)
            args = (k, v, cache, cache * 2, _slots(sample, tokens, 2 * tokens))
            yield Case(f"T{tokens}", args, cost, small=False, bench=True)
    small, slots = sample(2, 1, 4, 8), sample.integers(0, 8, 3)
    k, v = sample(3, 1, 8), sample(3, 1, 8)
    yield Bad("caches", (k, v, small, small[:1], slots), "expected twice [N, Hkv, P, D]")
    yield Bad("strided", (k, v, small.transpose(2, 3), small.transpose(2, 3), slots), "must be contiguous")
    yield Bad("heads", (k[..., :4], v, small, small * 2, slots), "expected twice [3, 1, 8]")
    yield Bad("dtype", (k.double(), v, small, small * 2, slots), "one dtype is required")
    yield Bad("slots", (k, v, small, small * 2, slots.int()), "expected int64")


@cases("qk_norm_mrope_append")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, num_q_heads, num_kv_heads, block_size in ((1, 2, 1, 4), (7, 4, 2, 8), (33, 2, 1, 32)):
        cache = sample(6, num_kv_heads, block_size, 128)
        slots = _slots(sample, tokens, 6 * block_size)
        args = (*_projection(sample, tokens, num_q_heads, num_kv_heads), cache, cache * 2, slots, _SECTIONS, 1e6, 1e-6)
        yield Case(f"T{tokens}_{num_q_heads}q_{num_kv_heads}kv", args)
    cache, slots = sample(3, 1, 4, 72), _slots(sample, 5, 12)
    yield Case("T5_D72", (*_projection(sample, 5, 2, 1, 72), cache, cache * 2, slots, [8, 14, 14], 1e6, 1e-6))
    if sample.big:
        for tokens in (1024, 4096):
            cache, slots = sample(tokens // 16, 8, 32, 128), _slots(sample, tokens, 2 * tokens)
            cost = Cost(bytes=2 * tokens * 48 * 128 * sample.itemsize)
            args = (*_projection(sample, tokens, 32, 8), cache, cache * 2, slots, _SECTIONS, 1e6, 1e-6)
            yield Case(f"T{tokens}_32q_8kv", args, cost, small=False, bench=True)
    qkv, weight, other, positions = _projection(sample, 3, 2, 1)
    cache, slots, rest = sample(2, 1, 4, 128), sample.integers(0, 8, 3), (_SECTIONS, 1e6, 1e-6)
    pair = (cache, cache * 2)
    yield Bad("width", (qkv[:, 1:], weight, other, positions, *pair, slots, *rest), "with Hq >= 1")
    yield Bad("weights", (qkv, weight[1:], other, positions, *pair, slots, *rest), "expected twice [128]")
    yield Bad("dtype", (qkv.double(), weight, other, positions, *pair, slots, *rest), "one dtype is required")
    yield Bad("slots", (qkv, weight, other, positions, *pair, slots[:2], *rest), "expected int64 [3]")


def _projection(
    sample: Sample, tokens: int, num_q_heads: int, num_kv_heads: int, dim: int = 128
) -> tuple[torch.Tensor, ...]:
    width = (num_q_heads + 2 * num_kv_heads) * dim
    return sample(tokens, width), sample(dim), sample(dim), sample.integers(0, 4000, 3, tokens)


@cases("copy_blocks")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for count in (0, 1, 3):
        cache = sample(8, 2, 4, 72)
        yield Case(f"{count}_pairs", (cache, cache * 2, sample.permutation(8)[: 2 * count].view(count, 2)))
    if sample.big:
        cache = sample(256, 8, 32, 128)
        cost = Cost(bytes=4 * 64 * 8 * 32 * 128 * sample.itemsize)
        yield Case(
            "64_pairs", (cache, cache * 2, sample.permutation(256)[:128].view(64, 2)), cost, small=False, bench=True
        )
    small = sample(2, 1, 4, 8)
    yield Bad("pairs", (small, small * 2, sample.integers(0, 2, 4)), "expected int64 [n, 2]")
