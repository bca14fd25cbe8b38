"""Draft steps in training, as serving makes them: each continues the head's own states (Li et al. 2025, section 3.2).

At draft step s the row of token t comes from the state that step s - 1 gave for it; it sees rows of step 0 up to
t - s, which serving computes from the target's features, and beyond them those of steps 1 to s along its own branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.layers import SelfAttention
from kvkeye.models.draft.head import DraftHead
from kvkeye.train.data import Batch


@dataclass(frozen=True)
class DraftStep:
    """rows [R] int64 into the batch's tokens, and logits [R, Vd] of the tokens after them."""

    rows: Tensor
    logits: Tensor


def unroll(head: DraftHead, features: Tensor, embeds: Tensor, batch: Batch, depth: int) -> Iterator[DraftStep]:
    """`depth` draft steps over all answers of a batch, each over the rows whose branch begins within the answer.

    features [T, 3 H] of the target, embeds [T, H] with media merged in.
    """
    layer, attention = head.midlayer, head.midlayer.self_attn
    hidden = _shifted(head.fuse(features), batch.cu_seqlens)  # [T, H], row t of the tokens before t
    q, k, v = _qkv(attention, layer.join(hidden, embeds), batch.positions)
    past = _Past(k, v, batch)
    rows, offsets = _draft_rows(batch)
    attended, _ = past.attend(q, attention.softmax_scale)
    states = layer.finish(_output(attention, attended[rows]), hidden[rows])
    yield DraftStep(rows, head.logits(states))
    for step in range(1, depth):
        kept = offsets >= step
        if not kept.any():
            return
        parents = torch.full((len(batch.ids),), -1)
        parents[rows] = torch.arange(len(rows))
        rows, offsets = rows[kept], offsets[kept]
        hidden = states[parents[rows - 1]]
        q, k, v = _qkv(attention, layer.join(hidden, embeds[rows]), batch.positions[:, rows])
        past.extend(rows, k, v)
        mixed = past.attend_branch(rows, q, step, attention.softmax_scale)
        states = layer.finish(_output(attention, mixed), hidden)
        yield DraftStep(rows, head.logits(states))


def _draft_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows that propose, the first token of each answer to its last but one, and their distance from the first."""
    first = torch.ones_like(batch.turn_of, dtype=torch.bool)
    first[1:] = batch.turn_of[1:] != batch.turn_of[:-1]
    index = torch.arange(len(batch.rows))
    offsets = index - index[first][batch.turn_of]  # 0 at the row that gave the first token of the answer
    kept = offsets > 0
    return batch.rows[kept], offsets[kept] - 1


def _shifted(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Every row takes the one before it, the first of each sequence zeros."""
    moved = torch.cat([hidden.new_zeros(1, hidden.shape[1]), hidden[:-1]])
    begin = torch.zeros(len(hidden), 1, dtype=torch.bool)
    begin[cu_seqlens[:-1].long()] = True
    return moved.masked_fill(begin, 0)


def _qkv(attention: SelfAttention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = attention.qkv_proj(x)
    q, k = ops.qk_norm_mrope(
        qkv, attention.q_norm, attention.k_norm, positions, attention.sections, attention.rope_theta, attention.eps,
        attention.num_kv_heads,
    )  # fmt: skip
    return q, k, qkv[:, -attention.num_kv_heads * attention.head_dim :].unflatten(-1, k.shape[1:])


def _output(attention: SelfAttention, attended: Tensor) -> Tensor:
    return attention.o_proj(attended.flatten(1))  # type: ignore[no-any-return]


class _Past:
    """Keys and values of step 0 for all rows, and of the later steps for the rows that they have."""

    def __init__(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        self.k, self.v, self.batch = k, v, batch
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # place of each row [T], k and v [R, Hkv, D]

    def extend(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        places = torch.full((len(self.k),), -1)
        places[rows] = torch.arange(len(rows))
        self.steps.append((places, k, v))

    def attend(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = ops.varlen_attention(q, self.k, self.v, self.batch.cu_seqlens, self.batch.max_seqlen, True, scale)
        return o, lse

    def attend_branch(self, rows: Tensor, q: Tensor, step: int, scale: float) -> Tensor:
        """q [R, Hq, D] of draft step `step` -> [R, Hq, D]."""
        # Standing at t - s, a query sees just the rows of step 0 that it may see.
        spread = q.new_zeros(len(self.k), *q.shape[1:]).index_copy(0, rows - step, q)
        o, lse = (part[rows - step] for part in self.attend(spread, scale))
        branch = [
            (k[places[rows - step + j]], v[places[rows - step + j]]) for j, (places, k, v) in enumerate(self.steps, 1)
        ]
        group = q.shape[1] // self.k.shape[1]
        keys, values = (torch.stack(part, 1).repeat_interleave(group, 2) for part in zip(*branch))  # [R, s, Hq, D]
        scores = torch.einsum("rhd,rshd->rhs", q, keys) * scale
        mixed = torch.einsum("rhs,rshd->rhd", scores.softmax(-1), values)
        merged: Tensor = ops.merge_attention_states(o, lse, mixed, scores.logsumexp(-1))[0]
        return merged
