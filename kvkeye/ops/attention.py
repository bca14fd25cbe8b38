"""Attention: over packed sequences, over a paged cache, and the merging of partial results."""

import itertools
import math
from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._fp8_cache import FP8, dequantized, scales_fit
from kvkeye.ops._op import op


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Optional[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention. q [S, Hq, D], k and v [L, Hkv, D], allowed [S, L] or None -> o [S, Hq, D], lse [S, Hq]."""
    group = q.shape[1] // k.shape[1]
    keys = wide(k).repeat_interleave(group, dim=1)  # [L, Hq, D]
    values = wide(v).repeat_interleave(group, dim=1)
    scores = torch.einsum("shd,lhd->hsl", wide(q), keys) * scale
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    lse = scores.logsumexp(-1)  # [Hq, S]
    # A row that may see nothing has lse = -inf and o = 0.
    weights = torch.exp(scores - torch.where(lse == -math.inf, torch.zeros_like(lse), lse)[..., None])
    return torch.einsum("hsl,lhd->shd", weights, values).to(q.dtype), lse.T


def _packed_fits(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, softmax_scale: float
) -> Iterator[str]:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        yield f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, Hq, D] and twice [T, Hkv, D]"
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        yield f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads"
    if q.dtype != k.dtype or k.dtype != v.dtype:
        yield f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; one dtype is required"
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 1:
        yield f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; expected int32 [B + 1]"


@op(requires=_packed_fits)
def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, each to itself.

    o[t, h] = sum_j softmax_j(softmax_scale q[t, h].k[j, g]) v[j, g], g = h // (Hq / Hkv), over the tokens j of the
    sequence of t (and j <= t if causal).

    Shapes     q [T, Hq, D]  k, v [T, Hkv, D]  cu_seqlens [B + 1]; T = cu_seqlens[B]
    Args       one floating dtype, rows may be strided;  cu_seqlens int32 ascending from 0;  max_seqlen the longest
    Returns    o [T, Hq, D] dtype of q;  lse [T, Hq] fp32, natural log of the softmax denominator
    Numerics   scores, softmax and sums in fp32; in bf16 `cpp` may round softmax weights, and in the backward pass the
               gradients of scores, to bf16 before they are multiplied
    Gradient   q, k, v (through o and lse)
    Errors     ValueError on shape, dtype or head disagreement
    Source     Vaswani et al. 2017, eq. 1; online softmax: Milakov and Gimelshein 2018
    """
    out, lses = [], []
    bounds = cu_seqlens.tolist()
    for start, stop in itertools.pairwise(bounds):
        length = stop - start
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if causal else None
        o, lse = _attend(q[start:stop], k[start:stop], v[start:stop], mask, softmax_scale)
        out.append(o)
        lses.append(lse)
    if not out:
        return q.new_empty(q.shape), wide(q).new_empty(q.shape[:2])
    return torch.cat(out), torch.cat(lses)


# The body reads the bounds; shapes need only q.
varlen_attention.fake(lambda q, *rest: (q.new_empty(q.shape), wide(q).new_empty(q.shape[:2])))


varlen_attention.implement("cpp")
varlen_attention.implement("triton", "attention:varlen_attention")
varlen_attention_backward = varlen_attention.differentiate("q", "k", "v", outputs=("out_0", "out_1"))
varlen_attention_backward.implement("cpp")
varlen_attention_backward.implement("triton", "attention:varlen_attention_backward")


def _paged_fits(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    tree_mask: Optional[Tensor], softmax_scale: float, k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> Iterator[str]:  # fmt: skip
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        yield f"k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; expected twice [N, Hkv, P, D]"
        return
    if q.dim() != 3 or q.shape[2] != k_cache.shape[3] or q.shape[1] % max(k_cache.shape[1], 1):
        yield f"q is {tuple(q.shape)}; expected [T, Hq, {k_cache.shape[3]}], Hq a multiple of {k_cache.shape[1]}"
    if k_cache.dtype != v_cache.dtype or (q.dtype if k_cache.dtype != FP8 else FP8) != k_cache.dtype:
        yield (
            f"q is {q.dtype}, the caches {k_cache.dtype} and {v_cache.dtype}; one dtype is required, or "
            "float8_e4m3fn of both caches"
        )
    yield from scales_fit(k_cache, k_scales, v_scales)
    batch = context_lens.shape[0]
    for name, tensor, shape in (
        ("block_table", block_table, (batch, block_table.shape[-1])),
        ("cu_seqlens_q", cu_seqlens_q, (batch + 1,)),
        ("context_lens", context_lens, (batch,)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected int32 {list(shape)}"
    if tree_mask is not None and (tree_mask.dtype != torch.int64 or tree_mask.shape != q.shape[:1]):
        yield f"tree_mask is {tree_mask.dtype} {tuple(tree_mask.shape)}; expected int64 [{q.shape[0]}]"


@op(requires=_paged_fits)
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    tree_mask: Optional[Tensor],
    softmax_scale: float,
    k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its paged keys and values.

    Row i of the n rows of sequence b stands at position context_lens[b] - n + i. Without `tree_mask` it sees all
    positions up to its own. With it, it sees the positions before the n rows, and of the rows those whose bit is
    set: bit j of tree_mask[t] lets row t see row j of its sequence.

    Shapes     q [T, Hq, D]  k_cache, v_cache [N, Hkv, P, D]  block_table [B, M]  cu_seqlens_q [B + 1]
               context_lens [B]  tree_mask [T] or None  k_scales, v_scales [N, Hkv, P] or None
    Args       q and caches one floating dtype, or float8_e4m3fn caches as append_kv writes them, with both scales
               in fp32: key = level * scale;  block_table int32, entries past ceil(context_lens / P) are not
               read;  context_lens int32 tokens, the new ones included and already in the cache;  tree_mask int64
               bits, at most 64 rows per sequence
    Returns    o [T, Hq, D] dtype of q;  lse [T, Hq] fp32;  a row that sees nothing gives o = 0, lse = -inf
    Numerics   as varlen_attention; `cpp` merges KV tiles in an order fixed by absolute position, and
               along the branch of a tree: a row gives the bits of the same tokens decoded one after the other
    Gradient   none (inference only); training uses varlen_attention
    Errors     ValueError on shape or dtype disagreement
    Source     Kwon et al. 2023, section 4.1; trees: Miao et al. 2024 (SpecInfer), section 4
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=wide(q).dtype, device=q.device)
    block_size = k_cache.shape[2]
    bounds = cu_seqlens_q.tolist()
    for b, length in enumerate(context_lens.tolist()):
        start, stop = bounds[b], bounds[b + 1]
        blocks = block_table[b, : -(-length // block_size)].long()
        keys, values = (
            dequantized(cache[blocks], None if scales is None else scales[blocks])  # [M, Hkv, P, D]
            .transpose(1, 2).flatten(0, 1)[:length]  # [L, Hkv, D]
            for cache, scales in ((k_cache, k_scales), (v_cache, v_scales))
        )  # fmt: skip
        mask = _visible(stop - start, length, None if tree_mask is None else tree_mask[start:stop], q.device)
        o[start:stop], lse[start:stop] = _attend(q[start:stop], keys, values, mask, softmax_scale)
    return o, lse


def _visible(rows: int, length: int, bits: Optional[Tensor], device: torch.device) -> Tensor:
    """[rows, length]: which positions each row sees."""
    position = torch.arange(length, device=device)
    own = torch.arange(length - rows, length, device=device)
    if bits is None:
        return position[None, :] <= own[:, None]
    row = (position - (length - rows))[None, :]  # index among the new rows, negative before them
    set_ = (bits[:, None] >> row.clamp(min=0)) & 1
    return (row < 0) | (set_ == 1)


paged_attention.fake(lambda q, *rest: (q.new_empty(q.shape), wide(q).new_empty(q.shape[:2])))


def _not_for_the_paged_kernel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    tree_mask: Optional[Tensor], softmax_scale: float, k_scales: Optional[Tensor] = None,
    v_scales: Optional[Tensor] = None,
) -> Iterator[str]:  # fmt: skip
    sizes = (64, 128) if k_cache.dtype == FP8 else (64, 72, 80, 128)
    if q.shape[2] not in sizes:
        known = ", ".join(map(str, sizes))
        yield f"the head size is {q.shape[2]}; over {k_cache.dtype} caches the GPU kernel takes {known}"
    if q.dtype != torch.bfloat16:
        yield f"q is {q.dtype}; the GPU kernel takes bfloat16"
    caches = {"k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales, "v_scales": v_scales}
    for name, cache in caches.items():
        if cache is not None and not cache.is_contiguous():
            yield f"{name} is not contiguous; the GPU kernel copies whole rows"


paged_attention.implement("cpp")
paged_attention.implement(
    "cuda", refuses=_not_for_the_paged_kernel, dtypes=(torch.bfloat16,), storage=(FP8, torch.float32)
)
paged_attention.implement("triton", "attention:paged_attention")


def _states_fit(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> Iterator[str]:
    if o_a.dim() != 3 or o_b.shape != o_a.shape or o_a.dtype != o_b.dtype:
        yield f"o_a is {o_a.dtype} {tuple(o_a.shape)}, o_b {o_b.dtype} {tuple(o_b.shape)}; expected twice [T, H, D]"
    elif lse_a.shape != o_a.shape[:2] or lse_b.shape != o_a.shape[:2]:
        yield f"lse_a {tuple(lse_a.shape)}, lse_b {tuple(lse_b.shape)}; expected twice {list(o_a.shape[:2])}"


@op(requires=_states_fit)
def merge_attention_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys, from the attention over each.

    lse = log(e^lse_a + e^lse_b), o = e^(lse_a - lse) o_a + e^(lse_b - lse) o_b.

    Shapes     o_a, o_b [T, H, D]  lse_a, lse_b [T, H]
    Args       o fp32 | bf16 | fp16;  lse fp32, -inf for an empty set
    Returns    o dtype of o_a, lse fp32; two empty sets give o = 0, lse = -inf
    Numerics   fp32, one rounding at the end
    Gradient   o_a, lse_a, o_b, lse_b
    Errors     ValueError on shape or dtype disagreement
    Source     Rabe and Staats 2021, section 3
    """
    peak = torch.maximum(lse_a, lse_b).detach()
    # Two empty sets: keep exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
    peak = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    a, b = torch.exp(lse_a - peak), torch.exp(lse_b - peak)
    total = a + b
    safe = torch.where(total == 0, torch.ones_like(total), total)
    o = (a / safe)[..., None] * wide(o_a) + (b / safe)[..., None] * wide(o_b)
    return o.to(o_a.dtype), torch.where(total == 0, torch.full_like(total, -math.inf), safe.log() + peak)


merge_attention_states.implement("cpp")
merge_attention_states.implement("triton", "attention:merge_attention_states")
merge_attention_states_backward = merge_attention_states.differentiate("o_a", "lse_a", "o_b", "lse_b")
merge_attention_states_backward.implement("cpp")
merge_attention_states_backward.implement("triton", "attention:merge_attention_states_backward")
