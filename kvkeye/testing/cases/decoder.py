"""Cases of the decoder family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvkeye import ops
from kvkeye.testing.case import Bad, Case, Sample, cases
from kvkeye.testing.cases.attention import paged_call


def layer_call(
    sample: Sample, contexts: list[int], news: list[int], residual: bool = True, form: str = "packed"
) -> tuple[Any, ...]:
    """Arguments of decoder_layer. `form` of the matrices: plain, packed or int8."""
    hidden, heads, kv_heads, dim, wide = 64, 2, 1, 64, 96
    shapes = {
        "input_norm": (hidden,), "qkv": ((heads + 2 * kv_heads) * dim, hidden), "q_norm": (dim,), "k_norm": (dim,),
        "out": (hidden, heads * dim), "post_norm": (hidden,), "gate_up": (2 * wide, hidden), "down": (hidden, wide),
    }  # fmt: skip
    weights, scales = [], []
    for name, shape in shapes.items():
        weight = sample(*shape, scale=1.0 if len(shape) == 1 else shape[-1] ** -0.5)
        parts = 2 if name == "gate_up" else 1
        if len(shape) == 2 and form == "packed":
            weight = ops.pack_weight(weight, parts, ops.values_per_word(sample.dtype))
        if len(shape) == 2 and form == "int8":
            weight, own = ops.quantize_weight(weight, parts)
            scales.append(own)
        weights.append(weight)
    _, k_cache, v_cache, table, bounds, lengths = paged_call(sample, contexts, news, (heads, kv_heads), 16, dim)
    places = [range(context - new, context) for context, new in zip(contexts, news, strict=True)]
    slots = [int(table[b, at // 16]) * 16 + at % 16 for b, own in enumerate(places) for at in own]
    positions = sample.tensor([[at + axis for own in places for at in own] for axis in range(3)], torch.int64)
    x = sample(sum(news), hidden)
    return (
        x, sample(sum(news), hidden) if residual else None, positions, weights, scales, k_cache, v_cache, table, bounds,
        lengths, sample.tensor(slots, torch.int64), None, [8, 12, 12], heads, wide, 1e4, 1e-6, dim**-0.5,
    )  # fmt: skip


@cases("decoder_layer")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("decode", layer_call(sample, [30, 7, 70], [1, 1, 1]))
    yield Case("prefill", layer_call(sample, [5, 40], [5, 17]))
    yield Case("first_layer", layer_call(sample, [9], [4], residual=False))
    yield Case("plain_weights", layer_call(sample, [9, 3], [2, 1], form="plain"))
    yield Case("int8_weights", layer_call(sample, [9, 3], [2, 1], form="int8"))
    args = layer_call(sample, [12, 5], [4, 3])
    mask = sample.tensor([0b0001, 0b0011, 0b0101, 0b1011, 0b001, 0b011, 0b111], torch.int64)
    yield Case("tree", (*args[:11], mask, *args[12:]))
    good = layer_call(sample, [9], [2])
    yield Bad("x", (good[0][0], *good[1:]), "expected [T, H]")
    yield Bad("residual", (good[0], good[1][:, 1:], *good[2:]), "residual is")
    yield Bad("weights", (*good[:3], good[3][1:], *good[4:]), "weights are 7; expected 8")
    yield Bad("scales", (*good[:4], good[3][:1], *good[5:]), "scales are 1; expected none, or 4")
    yield Bad("caches", (*good[:6], good[6][:1], *good[7:]), "expected twice [N, Hkv, P, D]")
    yield Bad("positions", (*good[:2], good[2][:2], *good[3:]), "positions is")
