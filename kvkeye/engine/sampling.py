"""The next tokens of a step from its logits: drawn, or verified against proposals, with their log-probabilities.

Knows logits and settings; must not know the model or its caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import ForwardBatch, SampleBatch, VerifyBatch
from kvkeye.engine.outputs import Logprob
from kvkeye.engine.staging import read

# Called with (row id, tokens before the drawn one) per drawn token and the logits [R, V] in the model's dtype. The next
# step may overwrite them.
LogitsHook = Callable[[list[tuple[int, int]], Tensor], None]


@dataclass(frozen=True)
class StepResult:
    """Per row id: the drawn tokens, -1 for a row without valid probabilities, and their log-probabilities if wanted.

    After proposals these are one answer's next tokens, all but the last of them proposed; `accepted` are the tokens of
    the step after which they were drawn, as indices into all T. `moves` are slots (source, target): keys and values of
    accepted tokens that lie behind others.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[dict[int, Logprob] | None]] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)
    moves: list[tuple[int, int]] = field(default_factory=list)


def draw(batch: ForwardBatch, logits: Tensor, hook: LogitsHook | None = None) -> StepResult:
    """The tokens that are due, from the logits [R, V] of the batch's `logit_rows`.

    The host waits once, and a second time where rows with proposals ask for log-probabilities.
    """
    result = StepResult()
    if not len(batch.logit_rows):
        return result
    verify = batch.verify
    # Without proposals and forks every row of the logits is drawn from once, in order: no copy is needed.
    is_plain = verify is None and len(batch.sample.rows) == len(logits)
    drawn_from = logits if is_plain else logits[batch.sample.rows]
    if hook is not None:
        hook(_names(batch), drawn_from)
    sampled = _sample(drawn_from, batch.sample)
    if verify is None:
        _add_sampled(read(sampled), batch, result)
        return result
    logits = logits if len(verify.rows) == len(logits) else logits[verify.rows]
    walked = ops.verify_draft(
        logits, verify.draft_tokens, verify.tree_parents, verify.cu_rows, None, *verify.settings.args(), None
    )
    values = read([*sampled, *walked])
    _add_sampled(values[: len(sampled)], batch, result)
    tokens, rows, counts = (list(map(int, part)) for part in values[len(sampled) :])
    logprobs = _tree_logprobs(logits, walked[0], rows, counts, verify)
    for tree, (first, count) in enumerate(zip(verify.bounds, counts)):
        places, seq_id = range(first, first + count), verify.seq_ids[tree]
        result.tokens[seq_id] = tokens[first : first + count]
        result.accepted[seq_id] = [verify.tokens[rows[place]] for place in places]
        result.logprobs[seq_id] = [logprobs.get(place) if tokens[place] >= 0 else None for place in places]
        result.moves.extend(
            (verify.slots[rows[place]], verify.slots[place]) for place in places if rows[place] != place
        )
        if hook is not None:
            start = verify.starts[tree]
            hook([(seq_id, start + 1 + i) for i in range(count)], logits[rows[first : first + count]])
    return result


def _names(batch: ForwardBatch) -> list[tuple[int, int]]:
    return [(row, length) for row, length, n in zip(batch.seq_ids, batch.lengths, batch.num_samples) for _ in range(n)]


def _sample(logits: Tensor, sample: SampleBatch) -> list[Tensor]:
    """logits [B, V] -> the B drawn tokens, and `_ranked` of each that asks for log-probabilities."""
    if not sample.num_logprobs:
        return []
    drawn = ops.sample(logits, *sample.settings.args(), None)
    asked = [(i, count) for i, count in enumerate(sample.num_logprobs) if count is not None]
    return [drawn, *(_ranked(logits[i], drawn[i : i + 1], count) for i, count in asked)]


def _add_sampled(values: list[list[float]], batch: ForwardBatch, result: StepResult) -> None:
    """Takes the values of what `_sample` gave."""
    if not values:
        return
    asked = [i for i, count in enumerate(batch.sample.num_logprobs) if count is not None]
    tokens, by_place = list(map(int, values[0])), dict(zip(asked, map(_named, values[1:])))
    logprobs = [by_place.get(i) if token >= 0 else None for i, token in enumerate(tokens)]
    start = 0
    for seq_id, count in zip(batch.seq_ids, batch.num_samples):
        if count:
            result.tokens[seq_id] = tokens[start : start + count]
            result.logprobs[seq_id] = logprobs[start : start + count]
            start += count


def _tree_logprobs(
    logits: Tensor, drawn: Tensor, rows: list[int], counts: list[int], verify: VerifyBatch
) -> dict[int, dict[int, Logprob]]:
    """Log-probabilities that were asked for, by place in `drawn` [R]; `rows` are the logits [R, V] that gave these."""
    asked = [
        (place, num_logprobs)
        for first, count, num_logprobs in zip(verify.bounds, counts, verify.num_logprobs)
        if num_logprobs is not None
        for place in range(first, first + count)
    ]
    if not asked:
        return {}
    values = read([_ranked(logits[rows[place]], drawn[place : place + 1], count) for place, count in asked])
    return {place: _named(found) for (place, _), found in zip(asked, values)}


def _ranked(logits: Tensor, token: Tensor, count: int) -> Tensor:
    """Rank of a drawn token, then it and the `count` likeliest, then their log-probabilities: [1 + 2 n] fp64.

    logits [V], token [1]; -1 gives something that nobody reads.
    """
    token = token.clamp(min=0)
    ids = torch.cat((token, logits.topk(min(count, logits.shape[0])).indices))  # [n]
    values = ops.token_logprobs(logits.expand(len(ids), -1), ids)
    rank = (logits > logits[token]).sum().view(1) + 1
    return torch.cat((rank.double(), ids.double(), values.double()))


def _named(values: list[float]) -> dict[int, Logprob]:
    """What `_ranked` found, by token."""
    count = len(values) // 2
    ids, logprobs = values[1 : 1 + count], values[1 + count :]
    found = {int(ids[0]): Logprob(logprobs[0], int(values[0]))}
    for rank, (token, value) in enumerate(zip(ids[1:], logprobs[1:]), 1):
        found.setdefault(int(token), Logprob(value, rank))
    return found
