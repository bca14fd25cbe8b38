"""A decoder layer over a paged cache as one op: for inference, where calls cost what small steps are made of."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._op import op
from kvkeye.ops._projections import gated, project
from kvkeye.ops.attention import paged_attention
from kvkeye.ops.kv_cache import qk_norm_mrope_append
from kvkeye.ops.norm import add_rms_norm, rms_norm

#: The order of decoder_layer's `weights`.
DECODER_WEIGHTS = ("input_norm", "qkv", "q_norm", "k_norm", "out", "post_norm", "gate_up", "down")
_MATRICES = ("qkv", "out", "gate_up", "down")


def _layer_fits(
    x: Tensor, residual: Optional[Tensor], positions: Tensor, weights: list[Tensor], scales: list[Tensor],
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    slot_mapping: Tensor, tree_mask: Optional[Tensor], sections: list[int], num_q_heads: int, intermediate: int,
    theta: float, eps: float, softmax_scale: float,
) -> Iterator[str]:  # fmt: skip
    if x.dim() != 2:
        yield f"x is {tuple(x.shape)}; expected [T, H]"
        return
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        yield f"residual is {residual.dtype} {tuple(residual.shape)}; expected {x.dtype} {list(x.shape)}"
    if len(weights) != len(DECODER_WEIGHTS):
        yield f"weights are {len(weights)}; expected {len(DECODER_WEIGHTS)}: {', '.join(DECODER_WEIGHTS)}"
    if len(scales) not in (0, len(_MATRICES)):
        yield f"scales are {len(scales)}; expected none, or {len(_MATRICES)} of int8 weights: {', '.join(_MATRICES)}"
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        yield f"caches are {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; expected twice [N, Hkv, P, D]"
    if tuple(positions.shape) != (3, x.shape[0]) or positions.dtype != torch.int64:
        yield f"positions is {positions.dtype} {tuple(positions.shape)}; expected torch.int64 {[3, x.shape[0]]}"


@op(mutates=("k_cache", "v_cache"), requires=_layer_fits)
def decoder_layer(
    x: Tensor,
    residual: Optional[Tensor],
    positions: Tensor,
    weights: list[Tensor],
    scales: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    slot_mapping: Tensor,
    tree_mask: Optional[Tensor],
    sections: list[int],
    num_q_heads: int,
    intermediate: int,
    theta: float,
    eps: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention and feed-forward part of a pre-norm layer with grouped queries, over a paged cache.

    Shapes     x, residual [T, H]  positions [3, T]  k_cache, v_cache [N, Hkv, P, D]  the rest as in paged_attention and
               qk_norm_mrope_append
    Args       x: what the layer before adds to `residual`, or the stream itself where that is None;  weights in the
               order of DECODER_WEIGHTS: matrices [O, K] or as pack_weight gives them (gate_up with parts=2), norms as
               vectors;  scales: none, or those of quantize_weight for qkv, out, gate_up and down;  intermediate: the
               width of the feed-forward part
    Returns    what the next layer adds, and the residual stream, both [T, H]; k_cache and v_cache are changed
    Numerics   the bits of the ops it is made of
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Yang et al. 2025 (Qwen3), section 2
    """
    w = dict(zip(DECODER_WEIGHTS, weights, strict=True))
    s = dict(zip(_MATRICES, scales))
    if residual is None:
        normed, total = rms_norm(x, w["input_norm"], eps), x
    else:
        normed, total = add_rms_norm(x, residual, w["input_norm"], eps)
    num_kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    qkv = project(normed, w["qkv"], (num_q_heads + 2 * num_kv_heads) * dim, s.get("qkv"))
    q = qk_norm_mrope_append(
        qkv, w["q_norm"], w["k_norm"], positions, k_cache, v_cache, slot_mapping, sections, theta, eps
    )  # [T, Hq, D]
    o = paged_attention(
        q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens, tree_mask, softmax_scale
    )[0].flatten(1)  # fmt: skip
    attended = project(o, w["out"], x.shape[1], s.get("out"))
    normed, total = add_rms_norm(attended, total, w["post_norm"], eps)
    inner = gated(normed, w["gate_up"], intermediate, s.get("gate_up"))  # [T, I]
    return project(inner, w["down"], x.shape[1], s.get("down")), total


decoder_layer.fake(lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)))


decoder_layer.implement("cpp")
