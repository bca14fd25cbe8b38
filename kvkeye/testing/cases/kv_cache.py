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
    for tokens, heads, block_size, dim in ((5, 2, 8, 72), (33, 1, 32, 128)):
        yield _fp8_case(sample, tokens, heads, block_size, dim)
    small, slots = sample(2, 1, 4, 8), sample.integers(0, 8, 3)
    k, v = sample(3, 1, 8), sample(3, 1, 8)
    levels, scales = sample.fp8(2, 1, 4, 8)
    fp8 = (k, v, levels, levels.clone(), slots)
    yield Bad("no_scales", fp8, "k_scales is None; torch.float8_e4m3fn caches need fp32 [2, 1, 4]")
    yield Bad("scales", (*fp8, scales, scales[:, :, 1:]), "v_scales is torch.float32 (2, 1, 3)")
    yield Bad("strided_scales", (*fp8, scales, scales.repeat_interleave(2, -1)[..., ::2]), "the scales must")
    rows = (levels[:1, :, :3].transpose(1, 2)[0], levels[1:, :, :3].transpose(1, 2)[0], *fp8[2:])
    yield Bad("fp8_rows", (*rows, scales, scales), "k is torch.float8_e4m3fn, v torch.float8_e4m3fn")
    yield Bad("useless_scales", (k, v, small, small * 2, slots, scales, scales), "scales go with torch.float8_e4m3fn")
    yield Bad("caches", (k, v, small, small[:1], slots), "expected twice [N, Hkv, P, D]")
    yield Bad("strided", (k, v, small.transpose(2, 3), small.transpose(2, 3), slots), "must be contiguous")
    yield Bad("heads", (k[..., :4], v, small, small * 2, slots), "expected twice [3, 1, 8]")
    yield Bad("dtype", (k.double(), v, small, small * 2, slots), "one dtype is required")
    yield Bad("slots", (k, v, small, small * 2, slots.int()), "expected int64")


def _fp8_case(sample: Sample, tokens: int, heads: int, block_size: int, dim: int) -> Case:
    """Rows of zeros, of one value far above the others and at the lower end of fp32 among normal ones."""
    k, v = sample(tokens, heads, dim), sample(tokens, heads, dim)
    k[0], k[2, :, 3], v[3] = 0.0, 1e4, v[3] * 1e-37
    (levels, scales), (others, other_scales) = (
        sample.fp8(9, heads, block_size, dim),
        sample.fp8(9, heads, block_size, dim),
    )
    args = (k, v, levels, others, _slots(sample, tokens, 9 * block_size), scales, other_scales)
    return Case(f"fp8_T{tokens}_P{block_size}", args, must_accept=_gpu_in_bf16(sample))


def _gpu_in_bf16(sample: Sample) -> tuple[str, ...]:
    return ("cuda",) if sample.dtype == torch.bfloat16 else ()


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
    for tokens, dim in ((5, 64), (7, 128)):
        (levels, scales), (others, other_scales) = sample.fp8(6, 2, 4, dim), sample.fp8(6, 2, 4, dim)
        args = (
            *_projection(sample, tokens, 4, 2, dim), levels, others, _slots(sample, tokens, 24),
            [part * dim // 128 for part in _SECTIONS], 1e6, 1e-6, scales, other_scales,
        )  # fmt: skip
        yield Case(f"fp8_T{tokens}_D{dim}", args, must_accept=_gpu_in_bf16(sample))
    qkv, weight, other, positions = _projection(sample, 3, 2, 1)
    cache, slots, rest = sample(2, 1, 4, 128), sample.integers(0, 8, 3), (_SECTIONS, 1e6, 1e-6)
    pair = (cache, cache * 2)
    yield Bad("width", (qkv[:, 1:], weight, other, positions, *pair, slots, *rest), "with Hq >= 1")
    yield Bad("weights", (qkv, weight[1:], other, positions, *pair, slots, *rest), "expected twice [128]")
    yield Bad("dtype", (qkv.double(), weight, other, positions, *pair, slots, *rest), "one dtype is required")
    yield Bad("slots", (qkv, weight, other, positions, *pair, slots[:2], *rest), "expected int64 [3]")
    levels = sample.fp8(2, 1, 4, 128)[0]
    yield Bad("no_scales", (qkv, weight, other, positions, levels, levels.clone(), slots, *rest), "k_scales is None")


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
