"""A step's plain numbers as the tensors that its passes take.

Knows rows, prompts and their media; must not know the model, the caches or the scheduler's decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvkeye.engine.batch import (
    DrawSettings,
    EncodeBatch,
    ForwardBatch,
    MediaUse,
    Prompt,
    SampleBatch,
    TokenInputs,
    VerifyBatch,
)
from kvkeye.engine.draft import branch_masks, depths_of
from kvkeye.engine.request import SamplingParams, Sequence
from kvkeye.engine.step import Row, Step


def build_encodings(step: Step, find: Callable[[int], Sequence]) -> EncodeBatch:
    """The media that `step` encodes. `find` gives the row of an id; its request's payload is a `Prompt`."""
    batch = EncodeBatch([], [], [])
    for encoding in step.encodings:
        prompt: Prompt = find(encoding.seq_id).request.payload
        pixels, grid = prompt.pixels(encoding.index)
        batch.names.append(encoding.embeds)
        batch.pixel_values.append(pixels)
        batch.grids.append(grid)
    return batch


def build_forward(step: Step, find: Callable[[int], Sequence], block_size: int) -> ForwardBatch:
    """The tensors of `step` on the host. `find` gives the row of an id; its request's payload is a `Prompt`."""
    rows, counts = step.rows, [len(row.tokens) for row in step.rows]
    bounds = list(accumulate(counts, initial=0))
    lengths = [row.start + count for row, count in zip(rows, counts)]
    sequences = [find(row.seq_id) for row in rows]
    media = [use for row, seq, first in zip(rows, sequences, bounds) for use in _media_uses(row, seq, first)]
    return ForwardBatch(
        inputs=TokenInputs(
            token_ids=_ints([token for row in rows for token in row.tokens]),
            positions=_positions(rows, sequences),
            block_table=_block_table(rows),
            cu_seqlens_q=_ints(bounds, torch.int32),
            context_lens=_ints(lengths, torch.int32),
            slot_mapping=_ints([slot for row in rows for slot in _slots(row, block_size)]),
            tree_mask=_tree_mask(rows),
        ),
        logit_rows=_ints([t for row, end in zip(rows, bounds[1:]) for t in _logit_rows(row, end)]),
        block_copies=torch.tensor(step.block_copies, dtype=torch.int64).view(-1, 2),
        media_rows=_ints([row for use in media for row in range(use.first, use.first + use.length)]),
        seq_ids=[row.seq_id for row in rows],
        bounds=bounds,
        lengths=lengths,
        num_samples=[0 if row.parents else row.num_samples for row in rows],
        in_prompt=[row.start < seq.num_prompt for row, seq in zip(rows, sequences)],
        media=media,
        sample=_sample_batch(rows, sequences),
        verify=_verify_batch(rows, sequences, block_size) if any(row.parents for row in rows) else None,
    )


def _ints(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _block_table(rows: list[Row]) -> Tensor:
    """[B, M] int32."""
    width = max((len(row.block_table) for row in rows), default=0)
    tables = [row.block_table + [0] * (width - len(row.block_table)) for row in rows]
    return torch.tensor(tables, dtype=torch.int32)


def _logit_rows(row: Row, end: int) -> range:
    """Rows of the pass, of which the row's last is end - 1, whose logits are needed."""
    if row.parents:
        return range(end - len(row.parents), end)
    return range(end - 1, end) if row.num_samples else range(0)


def _tree_mask(rows: list[Row]) -> Tensor | None:
    if not any(row.is_branched for row in rows):
        return None
    # What comes before a tree is a branch that leads to it.
    trees = [[*range(-1, row.root - 1), *(row.root + parent for parent in row.parents)] for row in rows]
    return _ints([mask for tree in trees for mask in branch_masks(tree)])


def _positions(rows: list[Row], sequences: list[Sequence]) -> Tensor:
    """[3, T]: the prompts' own positions, then one step per token on all axes, in trees per level."""
    parts: list[Tensor] = []
    generated: list[int] = []  # of decoding rows, in one tensor: a tensor each would dominate small steps

    def flush() -> None:
        parts.append(torch.tensor(generated, dtype=torch.int64).expand(3, -1))
        generated.clear()

    for row, seq in zip(rows, sequences):
        prompt: Prompt = seq.request.payload
        end = row.start + row.num_known
        if row.start < seq.num_prompt:
            flush()
            parts.append(prompt.positions[:, row.start : min(end, seq.num_prompt)])
        generated += range(max(row.start, seq.num_prompt) + prompt.position_delta, end + prompt.position_delta)
        generated += [end - 1 + depth + prompt.position_delta for depth in depths_of(row.parents)[1:]]
    flush()
    return torch.cat(parts, dim=1)


def _slots(row: Row, block_size: int, first: int = 0) -> Iterator[int]:
    for position in range(row.start + first, row.start + len(row.tokens)):
        yield row.block_table[position // block_size] * block_size + position % block_size


def _media_uses(row: Row, seq: Sequence, first: int) -> Iterator[MediaUse]:
    """What the row's tokens take from media; a chunk may begin and end inside a span."""
    end = row.start + len(row.tokens)
    for span in seq.request.media_between(row.start, end):
        start, stop = max(row.start, span.start), min(end, span.end)
        yield MediaUse(span.embeds, first + start - row.start, start - span.start, stop - start)


def _sample_batch(rows: list[Row], sequences: list[Sequence]) -> SampleBatch:
    """One entry per token to draw."""
    draws: list[_Draw] = []
    logit_rows: list[int] = []
    num_logit_rows = 0
    for row, seq in zip(rows, sequences):
        if row.parents:
            num_logit_rows += len(row.parents)
            continue
        draws += [_Draw(seq, row.start + len(row.tokens), seq.index + i) for i in range(row.num_samples)]
        logit_rows += [num_logit_rows] * row.num_samples
        num_logit_rows += row.num_samples > 0
    return SampleBatch(
        rows=_ints(logit_rows),
        settings=_settings(draws),
        num_logprobs=[draw.seq.request.sampling.logprobs for draw in draws],
    )


def _verify_batch(rows: list[Row], sequences: list[Sequence], block_size: int) -> VerifyBatch:
    """One tree per row with proposals."""
    trees: list[tuple[Row, Sequence]] = []
    logit_rows: list[int] = []
    tokens: list[int] = []
    num_logit_rows = num_tokens = 0
    for row, seq in zip(rows, sequences):
        count = len(row.parents) or (row.num_samples > 0)
        if row.parents:
            trees.append((row, seq))
            logit_rows += range(num_logit_rows, num_logit_rows + count)
            tokens += range(num_tokens + row.root, num_tokens + len(row.tokens))
        num_logit_rows += count
        num_tokens += len(row.tokens)
    bounds = list(accumulate((len(row.parents) for row, _ in trees), initial=0))
    return VerifyBatch(
        rows=_ints(logit_rows),
        draft_tokens=_ints([token for row, _ in trees for token in row.tokens[row.root :]]),
        tree_parents=_ints([parent for row, _ in trees for parent in row.parents], torch.int32),
        cu_rows=_ints(bounds, torch.int32),
        settings=_settings([_Draw(seq, row.start + row.root + 1, seq.index) for row, seq in trees]),
        bounds=bounds,
        tokens=tokens,
        slots=[slot for row, _ in trees for slot in _slots(row, block_size, row.root)],
        seq_ids=[row.seq_id for row, _ in trees],
        starts=[row.start + row.root for row, _ in trees],
        num_logprobs=[seq.request.sampling.logprobs for _, seq in trees],
    )


@dataclass(frozen=True)
class _Draw:
    """The token at `position` of answer number `index`."""

    seq: Sequence
    position: int
    index: int


def _settings(draws: list[_Draw]) -> DrawSettings:
    """Histories are sent only for rows with penalties."""
    params: list[SamplingParams] = [draw.seq.request.sampling for draw in draws]
    histories = [draw.seq.tokens if p.has_penalties else [] for draw, p in zip(draws, params)]

    temperature, top_p, min_p, repetition, presence, frequency = torch.tensor(  # at once: a call each would show
        [
            [0.0 if p.is_greedy else p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [p.repetition_penalty for p in params],
            [p.presence_penalty for p in params],
            [p.frequency_penalty for p in params],
        ],
        dtype=torch.float32,
    ).unbind(0)
    seeds, positions, sample_index = torch.tensor(
        [[draw.seq.request.seed for draw in draws], [draw.position for draw in draws], [draw.index for draw in draws]],
        dtype=torch.int64,
    ).unbind(0)
    return DrawSettings(
        temperature=temperature,
        top_k=_ints([p.top_k for p in params], torch.int32),
        top_p=top_p,
        min_p=min_p,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        history=_ints([token for tokens in histories for token in tokens], torch.int32),
        cu_history=_ints(list(accumulate(map(len, histories), initial=0)), torch.int32),
        num_prompt=_ints([draw.seq.num_prompt if h else 0 for draw, h in zip(draws, histories)], torch.int32),
        seeds=seeds,
        positions=positions,
        sample_index=sample_index,
    )
