"""Attention rows: prompts, training and decoding, beside PyTorch at every setting that might be its best."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _measure import Peer, Row
from torch import Tensor

from kvkeye import ops
from kvkeye.layers import LargePages

# The bars, 550 and 400 GFLOP/s and 32 GB/s, were set on a machine of 945 GFLOP/s in bf16 and 45 GB/s. On others they
# hold as shares of the limit.
PREFILL, TRAINING, DECODE = 550 / 945, 400 / 945, 32 / 45


def within(what: str, peers: int = 1) -> Callable[[list[Tensor]], None]:
    """Ours is no further from the fp32 answer, the last output, than twice the worst of the first `peers`."""

    def verify(outputs: list[Tensor]) -> None:
        mine, *others, truth = (output.float() for output in outputs)
        rounding = 2**-9 if outputs[0].dtype == torch.bfloat16 else 2**-16
        errors = [float((other - truth).abs().max()) for other in others[:peers]]
        allowed = 2 * max(errors, default=0.0) + rounding * float(truth.abs().max())
        if (gap := float((mine - truth).abs().max())) > allowed:
            raise AssertionError(f"{what}: {gap:.2e} from fp32; allowed {allowed:.2e}")

    return verify


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def in_blocks(rows: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    """[B, L, H, D] as shuffled cache blocks [N, H, size, D] and the table [B, L / size]."""
    batch, length, heads, dim = rows.shape
    order = torch.randperm(batch * length // size)
    cache = torch.empty(len(order), heads, size, dim, dtype=rows.dtype)
    cache[order] = rows.reshape(-1, size, heads, dim).transpose(1, 2)
    return cache, order.int().view(batch, -1)


def segments_row(count: int, length: int) -> Row:
    """Many short sequences, 16 heads of 72; torch has them as a batch, since all are of one length."""
    q, k, v = (values(count * length, 16, 72) for _ in range(3))
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32)

    def sdpa(dtype: torch.dtype) -> Callable[[], Tensor]:
        heads = [t.to(dtype).view(count, length, 16, 72).transpose(1, 2).contiguous() for t in (q, k, v)]
        return lambda: F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(q.shape)

    return Row(
        f"attention of {count} segments of {length} patches, 16 heads of 72, bf16",
        [Peer("torch SDPA", str(d).removeprefix("torch."), sdpa(d)) for d in (torch.bfloat16, torch.float32)],
        [],
        lambda: ops.varlen_attention(q, k, v, bounds, length, False, 72**-0.5)[0],
        within("varlen_attention"),
        flops=4.0 * count * length**2 * 16 * 72,
    )


def causal_row(tokens: int, paged: bool) -> Row:
    """A prompt, 32 query and 8 KV heads of 128; useful half of the products counted. Torch reads dense K and V."""
    q, k, v = (values(tokens, heads, 128) for heads in (32, 8, 8))
    bounds, context = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    (k_cache, table), (v_cache, v_table) = in_blocks(k[None]), in_blocks(v[None])
    v_cache[table.long()] = v_cache[v_table.long()]

    def ours() -> Tensor:
        if paged:
            return ops.paged_attention(q, k_cache, v_cache, table, bounds, context, None, 128**-0.5)[0]  # type: ignore[no-any-return]
        return ops.varlen_attention(q, k, v, bounds, tokens, True, 128**-0.5)[0]  # type: ignore[no-any-return]

    def sdpa(dtype: torch.dtype, repeated: bool) -> Callable[[], Tensor]:
        heads = [t.to(dtype).transpose(0, 1)[None].contiguous() for t in (q, k, v)]
        if repeated:
            heads = [heads[0], *(t.repeat_interleave(4, dim=1) for t in heads[1:])]
        return lambda: F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=not repeated)[0].transpose(
            0, 1
        )

    settings = itertools.product((torch.bfloat16, torch.float32), (False, True))
    peers = [
        Peer("torch SDPA", f"{str(d).removeprefix('torch.')}, {'heads repeated' if r else 'GQA flag'}", sdpa(d, r))
        for d, r in settings
    ]
    name = f"causal attention of {tokens} tokens{' from the cache' if paged else ''}, 32/8 heads of 128, bf16"
    flops = 2.0 * tokens**2 * 32 * 128
    return Row(name, peers, [], ours, within("causal attention"), flops=flops, least_vector=PREFILL)


def training_row(patches: int, dtype: torch.dtype) -> Row:
    """Forward and backward, 16 heads of 72; 3.5 times the forward pass's operations."""
    q, k, v, grad = (values(patches, 16, 72, dtype=dtype) for _ in range(4))
    bounds = torch.tensor([0, patches], dtype=torch.int32)

    def gradients(attend: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            return torch.cat(torch.autograd.grad(attend(*leaves), leaves, upstream))

    def sdpa(kind: torch.dtype) -> Callable[[], Tensor]:
        *leaves, upstream = (t.to(kind).transpose(0, 1)[None].contiguous() for t in (q, k, v, grad))
        return lambda: gradients(F.scaled_dot_product_attention, leaves, upstream).transpose(1, 2).flatten(0, 1)

    kinds = (torch.bfloat16, torch.float32) if dtype == torch.bfloat16 else (torch.float32,)
    return Row(
        f"attention of {patches} patches, forward and backward, 16 heads of 72, {str(dtype).removeprefix('torch.')}",
        [Peer("torch SDPA", str(kind).removeprefix("torch."), sdpa(kind)) for kind in kinds],
        [],
        lambda: gradients(lambda *t: ops.varlen_attention(*t, bounds, patches, False, 72**-0.5)[0], [q, k, v], grad),
        within("gradients"),
        flops=3.5 * 4.0 * patches**2 * 16 * 72,
        least_vector=TRAINING if dtype == torch.bfloat16 else 0.0,
    )


def decode_row(batch: int, context: int, rows: int) -> Row:
    """`rows` newest tokens of each sequence, 32 query and 8 KV heads of 128; KV bytes counted once.

    Keys and values lie in large pages on all sides, as those of the engine do.
    """
    memory = LargePages()
    q = values(batch * rows, 32, 128)
    k, v = values(batch, context, 8, 128), values(batch, context, 8, 128)
    (k_cache, table), (v_cache, v_table) = in_blocks(k), in_blocks(v)
    v_cache[table.long()] = v_cache[v_table.long()]
    k_cache, v_cache = memory.copy(k_cache), memory.copy(v_cache)
    bounds = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
    contexts = torch.full((batch,), context, dtype=torch.int32)
    heads = q.view(batch, rows, 32, 128).transpose(1, 2).contiguous()  # [B, Hq, rows, D]
    k, v = (memory.copy(t.transpose(1, 2).contiguous()) for t in (k, v))  # [B, Hkv, L, D]
    seen = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
    mask = seen if rows > 1 else None

    def packed(t: Tensor) -> Tensor:
        return t.reshape(batch, 8, 4 * rows, 128)

    def back(o: Tensor) -> Tensor:
        return o.reshape(batch, 32, rows, 128).transpose(1, 2).reshape(q.shape)

    def flag() -> Tensor:
        return back(F.scaled_dot_product_attention(heads, k, v, attn_mask=mask, enable_gqa=True))

    many = mask.repeat(4, 1) if mask is not None else None

    def by_rows() -> Tensor:
        return back(F.scaled_dot_product_attention(packed(heads), k, v, attn_mask=many))

    def by_hand(dtype: torch.dtype) -> Callable[[], Tensor]:
        left, keys, rights = packed(heads).to(dtype), memory.copy(k.to(dtype)), memory.copy(v.to(dtype))

        def run() -> Tensor:
            scores = left @ keys.transpose(-1, -2) * 128**-0.5
            if many is not None:
                scores = scores.masked_fill(~many, -torch.inf)
            return back(scores.softmax(-1) @ rights)

        return run

    peers = [
        Peer("torch", "SDPA, GQA flag", flag),
        Peer("torch", "SDPA, heads packed as rows", by_rows),
        Peer("torch", "two products and softmax", by_hand(torch.bfloat16)),
        Peer("torch", "two products and softmax, float32", by_hand(torch.float32)),
    ]
    kind = "decoding" if rows == 1 else f"verifying {rows} tokens"
    return Row(
        f"{kind}: {batch} x {context} tokens of context, 32/8 heads of 128, bf16",
        peers,
        [],
        lambda: ops.paged_attention(q, k_cache, v_cache, table, bounds, contexts, None, 128**-0.5)[0],
        within("paged_attention", peers=3),
        flops=4.0 * batch * rows * context * 32 * 128 if rows > 1 else 0.0,
        streamed=2.0 * batch * context * 8 * 128 * 2,
        least_read=DECODE if (batch, rows) == (1, 1) else 0.0,
    )
