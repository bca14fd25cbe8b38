"""Losses and log-probabilities."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _targets_fit(logits: Tensor, targets: Tensor) -> Iterator[str]:
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        yield (
            f"logits is {tuple(logits.shape)} and targets {targets.dtype} {tuple(targets.shape)}; "
            "expected [T, V] and int64 [T]"
        )


@op(requires=_targets_fit)
def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[t, targets[t]].

    Shapes     logits [T, V]  targets [T]
    Args       logits floating;  targets int64 in [0, V)
    Returns    [T] fp32
    Numerics   fp32 with the row's maximum subtracted
    Gradient   logits
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    rows = wide(logits)
    chosen = rows.gather(1, targets[:, None])[:, 0]
    return chosen - rows.logsumexp(-1)


token_logprobs.implement("cpp")
token_logprobs.implement("triton", "loss:token_logprobs")
token_logprobs_backward = token_logprobs.differentiate("logits")
token_logprobs_backward.implement("cpp")
token_logprobs_backward.implement("triton", "loss:token_logprobs_backward")
