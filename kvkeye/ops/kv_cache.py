"""Writes into the paged cache. Slot = block * P + offset; slot -1 writes nothing."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._fp8_cache import FP8, quantized, scales_fit
from kvkeye.ops._op import op
from kvkeye.ops.rope import _positions_fit, normed_and_rotated


def _caches_fit(k_cache: Tensor, v_cache: Tensor) -> Iterator[str]:
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        yield f"k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; expected twice [N, Hkv, P, D]"
    elif not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        yield "the caches must be contiguous, as they are written in place"


def _scales_fit(k_cache: Tensor, k_scales: Optional[Tensor], v_scales: Optional[Tensor]) -> Iterator[str]:
    yield from scales_fit(k_cache, k_scales, v_scales)
    if any(scales is not None and not scales.is_contiguous() for scales in (k_scales, v_scales)):
        yield "the scales must be contiguous, as they are written in place"


def _dtype_fits(rows: Tensor, cache: Tensor) -> bool:
    is_quantized = cache.dtype == FP8
    return rows.is_floating_point() and rows.dtype != FP8 if is_quantized else rows.dtype == cache.dtype


def _write(cache: Tensor, scales: Optional[Tensor], rows: Tensor, slot_mapping: Tensor) -> None:
    """cache [N, Hkv, P, D], scales [N, Hkv, P], rows [T, Hkv, D]."""
    valid = slot_mapping >= 0
    rows, slots = rows[valid], slot_mapping[valid]
    block, offset = slots // cache.shape[2], slots % cache.shape[2]
    if scales is not None:
        rows, scales[block, :, offset] = quantized(rows)
    cache[block, :, offset] = rows.to(cache.dtype)


def _append_fits(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> Iterator[str]:  # fmt: skip
    yield from _caches_fit(k_cache, v_cache)
    yield from _scales_fit(k_cache, k_scales, v_scales)
    expected = (slot_mapping.shape[0], k_cache.shape[1], k_cache.shape[-1])
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        yield f"k is {tuple(k.shape)} and v {tuple(v.shape)}; expected twice {list(expected)}"
    if k.dtype != v.dtype or not _dtype_fits(k, k_cache):
        yield f"k is {k.dtype}, v {v.dtype}, the cache {k_cache.dtype}; one dtype is required, or a float8_e4m3fn cache"
    if slot_mapping.dtype != torch.int64:
        yield f"slot_mapping is {slot_mapping.dtype}; expected int64"


@op(mutates=("k_cache", "v_cache", "k_scales", "v_scales"), requires=_append_fits)
def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> None:
    """Writes the keys and values of new tokens into their slots.

    Shapes     k, v [T, Hkv, D]  k_cache, v_cache [N, Hkv, P, D]  slot_mapping [T]  k_scales, v_scales [N, Hkv, P]
    Args       one dtype, rows of k and v may be strided;  slot_mapping int64, distinct, -1 to skip;  with
               float8_e4m3fn caches k and v keep theirs, and both scales, fp32, are required
    Returns    nothing; caches and scales are changed
    Numerics   data movement, exact; into float8_e4m3fn each head of each token by itself: scale = largest value / 448,
               levels = values / scale in fp32, rounded to nearest even; a head with an infinity or a NaN has the scale
               NaN. Slots that are e4m3 already move as bytes (view(torch.uint8)), their scales beside them
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Kwon et al. 2023, section 4.2; e4m3: Micikevicius et al. 2022
    """
    _write(k_cache, k_scales, k, slot_mapping)
    _write(v_cache, v_scales, v, slot_mapping)


append_kv.fake(lambda *args: None)


def _quantizes_other_rows(k: Tensor, v: Tensor, k_cache: Tensor, *rest: object) -> Iterator[str]:
    if k_cache.dtype == FP8 and k.dtype != torch.bfloat16:
        yield f"k is {k.dtype}; into float8_e4m3fn the GPU kernel writes bfloat16"


append_kv.implement("cpp")
append_kv.implement("cuda", refuses=_quantizes_other_rows, storage=(FP8,))


def _fused_append_fits(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping: Tensor, sections: list[int], theta: float, eps: float, k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> Iterator[str]:  # fmt: skip
    yield from _caches_fit(k_cache, v_cache)
    yield from _scales_fit(k_cache, k_scales, v_scales)
    head_dim, num_kv_heads = k_cache.shape[-1], k_cache.shape[1]
    if qkv.dim() != 2 or qkv.shape[-1] % head_dim or qkv.shape[-1] // head_dim <= 2 * num_kv_heads:
        yield f"qkv is {tuple(qkv.shape)}; expected [T, (Hq + 2 x {num_kv_heads}) x {head_dim}] with Hq >= 1"
        return
    if tuple(q_weight.shape) != (head_dim,) or tuple(k_weight.shape) != (head_dim,):
        yield f"q_weight is {tuple(q_weight.shape)}, k_weight {tuple(k_weight.shape)}; expected twice [{head_dim}]"
    if not _dtype_fits(qkv, k_cache):
        yield f"qkv is {qkv.dtype}, the cache {k_cache.dtype}; one dtype is required, or a float8_e4m3fn cache"
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != qkv.shape[:1]:
        yield f"slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}; expected int64 [{qkv.shape[0]}]"
    yield from _positions_fit(qkv.shape[0], head_dim, positions, sections)


@op(mutates=("k_cache", "v_cache", "k_scales", "v_scales"), requires=_fused_append_fits)
def qk_norm_mrope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    sections: list[int],
    theta: float,
    eps: float,
    k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> Tensor:
    """qk_norm_mrope, then append_kv of the keys and the values, in one pass over the projection.

    Shapes     qkv [T, (Hq + 2 Hkv) D]  q_weight, k_weight [D]  positions [3, T]
               k_cache, v_cache [N, Hkv, P, D]  slot_mapping [T]  k_scales, v_scales [N, Hkv, P]
    Args       as qk_norm_mrope and append_kv
    Returns    q [T, Hq, D]; caches and scales are changed
    Numerics   rounded where the separate ops would round
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     as qk_norm_mrope
    """
    head_dim, num_kv_heads = k_cache.shape[-1], k_cache.shape[1]
    heads = qkv.view(qkv.shape[0], -1, head_dim)  # [T, Hq + 2 Hkv, D]
    q, k, v = heads.split((heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads), dim=1)
    _write(k_cache, k_scales, normed_and_rotated(k, k_weight, positions, sections, theta, eps), slot_mapping)
    _write(v_cache, v_scales, v, slot_mapping)
    return normed_and_rotated(q, q_weight, positions, sections, theta, eps)


def _fake_queries(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, k_cache: Tensor, *rest: object
) -> Tensor:
    head_dim = k_cache.shape[-1]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * k_cache.shape[1], head_dim))


qk_norm_mrope_append.fake(_fake_queries)


def _not_for_the_fused_kernel(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, k_cache: Tensor, *rest: object
) -> Iterator[str]:
    if q_weight.numel() not in (64, 128, 256):
        yield f"the head size is {q_weight.numel()}; the GPU kernel takes 64, 128 and 256"
    if k_cache.dtype == FP8 and (qkv.dtype != torch.bfloat16 or q_weight.numel() == 256):
        yield (
            f"qkv is {qkv.dtype}, the head size {q_weight.numel()}; into float8_e4m3fn the GPU kernel writes bfloat16 "
            "of head size 64 and 128"
        )


qk_norm_mrope_append.implement("cpp")
qk_norm_mrope_append.implement("cuda", refuses=_not_for_the_fused_kernel, storage=(FP8,))


def _pairs_fit(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> Iterator[str]:
    yield from _caches_fit(k_cache, v_cache)
    if block_pairs.dtype != torch.int64 or block_pairs.dim() != 2 or block_pairs.shape[1] != 2:
        yield f"block_pairs is {block_pairs.dtype} {tuple(block_pairs.shape)}; expected int64 [n, 2]"


@op(mutates=("k_cache", "v_cache"), requires=_pairs_fit)
def copy_blocks(k_cache: Tensor, v_cache: Tensor, block_pairs: Tensor) -> None:
    """Copies whole blocks: block_pairs[i] = (source, target).

    Shapes     k_cache, v_cache [N, Hkv, P, D]  block_pairs [n, 2]
    Args       block_pairs int64; targets are distinct and no target is a source;  float8_e4m3fn caches as bytes
               (view(torch.uint8)), their scales as caches of one value a row
    Returns    nothing; k_cache and v_cache are changed
    Numerics   data movement, exact
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Kwon et al. 2023, section 4.4 (copy on write)
    """
    source, target = block_pairs.unbind(1)
    k_cache[target] = k_cache[source]
    v_cache[target] = v_cache[source]


copy_blocks.fake(lambda *args: None)


copy_blocks.implement("cpp")
copy_blocks.implement("cuda")
