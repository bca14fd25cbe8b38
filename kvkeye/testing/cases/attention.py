"""Cases of the attention family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


def _packed(sample: Sample, lengths: list[int], num_q_heads: int, num_kv_heads: int, dim: int) -> tuple[Any, ...]:
    tokens = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (sample(tokens, heads, dim) for heads in (num_q_heads, num_kv_heads, num_kv_heads))
    return q, k, v, sample.tensor(bounds.tolist(), torch.int32), max(lengths, default=0)


@cases("varlen_attention")
def _(sample: Sample) -> Iterator[Case | Bad]:
    shapes: tuple[tuple[list[int], int, int, int], ...] = (
        ([1], 1, 1, 8), ([5, 3], 2, 1, 72), ([0, 7, 1, 0], 2, 2, 128), ([70, 20], 4, 2, 72), ([33], 4, 1, 128),
    )  # fmt: skip
    for lengths, num_q_heads, num_kv_heads, dim in shapes:
        for causal in (False, True):
            args = (*_packed(sample, lengths, num_q_heads, num_kv_heads, dim), causal, dim**-0.5)
            yield Case(f"{lengths}_{num_q_heads}q{num_kv_heads}kv_D{dim}_{'causal' if causal else 'full'}", args)
    if sample.big:
        for dim, heads, causal in ((72, 16, False), (128, 16, True)):
            flops = 4 * heads * dim * 1024 * 1024 // (2 if causal else 1)
            cost = Cost(bytes=4 * 1024 * heads * dim * sample.itemsize, flops=flops)
            args = (*_packed(sample, [1024], heads, heads, dim), causal, dim**-0.5)
            yield Case(f"1024_{heads}h_D{dim}", args, cost, small=False, bench=True)
    q, k, v, bounds, longest = _packed(sample, [4], 2, 2, 8)
    yield Bad("shapes", (q, k[:3], v, bounds, longest, True, 1.0), "expected [T, Hq, D]")
    yield Bad("heads", (sample(4, 3, 8), k, v, bounds, longest, True, 1.0), "not a multiple of 2 KV heads")
    yield Bad("dtype", (q, k.double(), v, bounds, longest, True, 1.0), "one dtype is required")
    yield Bad("bounds", (q, k, v, bounds.long(), longest, True, 1.0), "expected int32 [B + 1]")


def paged_call(
    sample: Sample, context: list[int], rows: list[int], heads: tuple[int, int], block_size: int, dim: int
) -> tuple[Any, ...]:
    needed = [-(-length // block_size) for length in context]
    num_blocks = sum(needed) + 2
    width = max(max(needed), 1)
    order = sample.permutation(num_blocks)
    table = torch.full((len(context), width), -1, dtype=torch.int32)
    taken = 0
    for b, count in enumerate(needed):
        table[b, :count] = order[taken : taken + count].int()
        taken += count
    cache = sample(num_blocks, heads[1], block_size, dim)
    bounds = torch.tensor([0, *rows]).cumsum(0).tolist()
    return (
        sample(sum(rows), heads[0], dim), cache, sample(*cache.shape), table.to(sample.device),
        sample.tensor(bounds, torch.int32), sample.tensor(context, torch.int32),
    )  # fmt: skip


def _in_fp8(sample: Sample, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call over e4m3 caches of other values."""
    q, k, v, *rest = args
    (k, k_scales), (v, v_scales) = sample.fp8(*k.shape), sample.fp8(*v.shape)
    return q, k, v, *rest, k_scales, v_scales


def _with_subnormal_levels(sample: Sample, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same FP8 call with levels of -7 to 7 times 2^-9, which a conversion may lose."""
    q, k, _, *rest, k_scales, v_scales = args
    levels = [(sample.integers(-7, 8, *k.shape) * 2.0**-9).to(k.dtype) for _ in range(2)]
    return q, *levels, *rest, k_scales * 2.0**9, v_scales * 2.0**9


@cases("paged_attention")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("decode", (*paged_call(sample, [1, 9, 70], [1, 1, 1], (2, 1), 8, 128), None, 128**-0.5))
    yield Case("prefill", (*paged_call(sample, [5, 40], [5, 17], (4, 2), 16, 72), None, 72**-0.5))
    yield Case("mixed", (*paged_call(sample, [33, 64, 6], [1, 64, 3], (4, 1), 32, 128), None, 0.1))
    yield Case("idle_row", (*paged_call(sample, [0, 3], [0, 1], (2, 2), 4, 8), None, 0.3))
    args = paged_call(sample, [12, 5], [4, 3], (2, 1), 8, 128)
    # Two branches under a root, and a chain.
    mask = sample.tensor([0b0001, 0b0011, 0b0101, 0b1011, 0b001, 0b011, 0b111], torch.int64)
    yield Case("tree", (*args, mask, 128**-0.5))
    q, k, v, *rest = paged_call(sample, [9, 3], [2, 1], (2, 1), 4, 72)
    wide = torch.cat((k, v), -1)  # keys and values of a token side by side
    yield Case("strided_caches", (q, wide[..., :72], wide[..., 72:], *rest, None, 72**-0.5))
    yield Case("splits", (*paged_call(sample, [1100], [2], (2, 1), 32, 128), None, 128**-0.5), small=False)
    for name, args in (
        ("fp8_decode", (*paged_call(sample, [1, 9, 70], [1, 1, 1], (2, 1), 8, 128), None, 128**-0.5)),
        ("fp8_mixed", (*paged_call(sample, [33, 64, 6], [1, 40, 3], (4, 1), 32, 64), None, 64**-0.5)),
        ("fp8_tree", (*paged_call(sample, [12, 5], [4, 3], (2, 1), 8, 128), mask, 128**-0.5)),
    ):
        yield Case(name, _in_fp8(sample, args), must_accept=("cuda",) if sample.dtype == torch.bfloat16 else ())
    args = _in_fp8(sample, (*paged_call(sample, [1100], [2], (2, 1), 32, 128), None, 128**-0.5))
    yield Case("fp8_splits", args, small=False, must_accept=())
    yield Case("fp8_subnormal_levels", _with_subnormal_levels(sample, args), small=False, must_accept=())
    args = _in_fp8(sample, (*paged_call(sample, [9, 3], [2, 1], (2, 1), 4, 72), None, 72**-0.5))
    yield Case("fp8_D72", args, must_accept=())
    q, k, v, *rest, k_scales, v_scales = args
    turned = v_scales.transpose(0, 2).contiguous().transpose(0, 2)
    yield Case("fp8_strided_scales", (q, k, v, *rest, k_scales, turned), must_accept=())
    if sample.big:
        cost = Cost(bytes=2 * 4096 * 8 * 128 * sample.itemsize, flops=4 * 32 * 128 * 4096)
        args = paged_call(sample, [4096], [1], (32, 8), 32, 128)
        yield Case("decode_4096_32q8kv", (*args, None, 128**-0.5), cost, small=False, bench=True)
    q, k, v, table, bounds, context = paged_call(sample, [3], [1], (2, 1), 4, 8)
    yield Bad("caches", (q, k, v[:1], table, bounds, context, None, 1.0), "expected twice [N, Hkv, P, D]")
    yield Bad("heads", (q[..., :4], k, v, table, bounds, context, None, 1.0), "Hq a multiple of")
    yield Bad("dtype", (q.double(), k, v, table, bounds, context, None, 1.0), "one dtype is required")
    yield Bad("table", (q, k, v, table.long(), bounds, context, None, 1.0), "block_table is")
    yield Bad("mask", (q, k, v, table, bounds, context, table[0], 1.0), "expected int64 [1]")
    levels, scales = sample.fp8(*k.shape)
    fp8 = (q, levels, levels, table, bounds, context, None, 1.0)
    yield Bad("mixed", (q, levels, v, table, bounds, context, None, 1.0, scales, scales), "float8_e4m3fn of both")
    yield Bad("no_scales", fp8, "k_scales is None; torch.float8_e4m3fn caches need fp32")
    yield Bad("scales", (*fp8, scales.double(), scales), "k_scales is torch.float64")
    yield Bad("useless_scales", (q, k, v, table, bounds, context, None, 1.0, scales), "k_scales are given, but")


@cases("merge_attention_states")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tokens, heads, dim in ((1, 1, 8), (5, 3, 72), (4, 2, 128)):
        lse_a, lse_b = sample.fp32(tokens, heads, scale=8.0), sample.fp32(tokens, heads, scale=8.0)
        states = (sample(tokens, heads, dim), lse_a, sample(tokens, heads, dim), lse_b)
        yield Case(f"T{tokens}_H{heads}_D{dim}", states)
    if sample.big:
        o_a, lse_a, o_b, lse_b = (
            sample(1024, 32, 128),
            sample.fp32(1024, 32),
            sample(1024, 32, 128),
            sample.fp32(1024, 32),
        )
        cost = Cost(bytes=3 * o_a.numel() * sample.itemsize)
        yield Case("T1024_H32_D128", (o_a, lse_a, o_b, lse_b), cost, small=False, bench=True)
    o_a, lse_a, o_b, lse_b = sample(5, 2, 8), sample.fp32(5, 2), sample(5, 2, 8), sample.fp32(5, 2)
    yield Bad("shapes", (o_a, lse_a, o_b[:3], lse_b), "expected twice [T, H, D]")
    yield Bad("lse", (o_a, lse_a[:3], o_b, lse_b), "expected twice [5, 2]")
