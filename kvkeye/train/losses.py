"""Losses: next token on answers, and an auxiliary one that names what each patch shows.

Both are means over the whole batch, so that packing does not change what a sample weighs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers import Linear, PackedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.train.data import Batch
from kvkeye.train.render import LABEL_SIZES


class PatchHead(nn.Module):
    """Linear heads that name colour, shape and glyphs of a patch from the tower's features; training only."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, sum(LABEL_SIZES))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """features [N, d] -> one [N, classes] per label."""
        return self.linear(features).split(LABEL_SIZES, dim=1)  # type: ignore[no-any-return]


def answer_logits(model: KeyeModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Runs a batch: logits of the answer rows [A, V], and the tower's features [N, d]."""
    features = model.visual(batch.pixel_values(model.dtype), batch.grids)
    media = model.projector(features, batch.grids)  # [n, H]
    embeds = model.embed(batch.ids, media[batch.pad_sources], batch.pads)  # [T, H]
    hidden = model(embeds, batch.positions, PackedContext(batch.cu_seqlens, batch.max_seqlen))
    return model.logits(hidden[batch.rows]), features


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the answer tokens of the batch."""
    mean: Tensor = ops.token_logprobs(logits, batch.targets).mean()
    return -mean


def patch_loss(scores: tuple[Tensor, ...], labels: Tensor, empty_weight: float = 0.1) -> Tensor:
    """Sum over the label kinds of the weighted mean cross-entropy; patches that show nothing weigh `empty_weight`.

    scores: one [N, classes] per label kind; labels [N, kinds] int64, 0 = nothing.
    """
    total = scores[0].new_zeros(())
    for score, label in zip(scores, labels.unbind(1)):
        weight = torch.where(label > 0, 1.0, empty_weight)
        total = total - (ops.token_logprobs(score.contiguous(), label) * weight).sum() / weight.sum()
    return total
