"""The forward pass: media embeddings, paged KV caches, logits, sampling.

Knows tensors; must not know requests' lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import EncodeBatch, ForwardBatch, SampleBatch, VerifyBatch
from kvkeye.engine.outputs import Logprob
from kvkeye.layers import PagedContext
from kvkeye.models.keye.model import KeyeModel

# Called with (row id, tokens before the drawn one) per drawn token and the logits [R, V] in the model's dtype.
LogitsHook = Callable[[list[tuple[int, int]], Tensor], None]


@dataclass(frozen=True)
class StepResult:
    """Per row id: the drawn tokens, -1 for a row without valid probabilities, and their log-probabilities if wanted.

    After proposals these are one answer's next tokens, all but the last of them proposed.
    """

    tokens: dict[int, list[int]]
    logprobs: dict[int, list[dict[int, Logprob] | None]]


class Runner:
    """One model with its caches. `backends` orders op implementations for everything that runs here."""

    def __init__(self, model: KeyeModel, num_blocks: int, block_size: int, backends: str = "") -> None:
        self.model = model
        self.backends = backends
        self.media_embeds: dict[bytes, Tensor] = {}  # [tokens, hidden] by name; the scheduler says what stays
        self.logits_hook: LogitsHook | None = None
        text = model.config.text
        shape = (num_blocks, text.num_key_value_heads, block_size, text.head_dim)
        layers = range(text.num_hidden_layers)
        self.k_caches = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.v_caches = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]

    def _forced(self) -> AbstractContextManager[None]:
        return ops.use_backends(self.backends) if self.backends else nullcontext()

    def run(self, batch: ForwardBatch) -> StepResult:
        """Computes a step: caches get the keys and values of its tokens, rows that are due get their next tokens."""
        with torch.inference_mode(), self._forced():
            if len(batch.block_copies):
                for k_cache, v_cache in zip(self.k_caches, self.v_caches):
                    ops.copy_blocks(k_cache, v_cache, batch.block_copies)
            hidden = self.model(self._embed(batch), batch.positions, self._context(batch))  # [T, H]
            if not len(batch.logit_rows):
                return StepResult({}, {})
            logits = self.model.logits(hidden[batch.logit_rows])  # [R, V]
            result = StepResult({}, {})
            verify = batch.verify
            # Without proposals and forks every row of the logits is drawn from once, in order: no copy is needed.
            is_plain = verify is None and len(batch.sample.rows) == len(logits)
            drawn_from = logits if is_plain else logits[batch.sample.rows]
            if self.logits_hook is not None:
                self.logits_hook(_logit_names(batch), drawn_from)
            if len(batch.sample.num_logprobs):
                _collect(batch, *_draw(drawn_from, batch.sample), result)
            if verify is not None:
                whole = len(verify.rows) == len(logits)
                self._verify(logits if whole else logits[verify.rows], verify, result)
            return result

    def _verify(self, logits: Tensor, verify: VerifyBatch, result: StepResult) -> None:
        """Draws down the trees of proposals, and moves what was accepted to its place in the caches. logits [R, V]."""
        drawn, from_rows, counts = (
            part.tolist()
            for part in ops.verify_draft(
                logits, verify.draft_tokens, verify.tree_parents, verify.cu_rows, None, *verify.settings.args(), None
            )
        )
        moves: list[tuple[int, int]] = []
        for tree, count in enumerate(counts):
            first = verify.bounds[tree]
            tokens, rows = drawn[first : first + count], from_rows[first : first + count]
            places = zip(rows, range(first, first + count))
            moves += [(verify.slots[row], verify.slots[place]) for row, place in places if row != place]
            seq_id, start, wanted = verify.seq_ids[tree], verify.starts[tree], verify.num_logprobs[tree]
            result.tokens[seq_id] = tokens
            result.logprobs[seq_id] = [_wanted_logprobs(logits[row], token, wanted) for row, token in zip(rows, tokens)]
            if self.logits_hook is not None:
                self.logits_hook([(seq_id, start + 1 + i) for i in range(count)], logits[rows])
        if moves:
            self._move_slots(moves)

    def _move_slots(self, moves: list[tuple[int, int]]) -> None:
        """Copies keys and values of single tokens (source, target); sources are read before targets are written."""
        source, target = torch.tensor(moves, dtype=torch.int64).to(self.model.device).unbind(1)
        block_size = self.k_caches[0].shape[2]
        block, offset = source // block_size, source % block_size
        for k_cache, v_cache in zip(self.k_caches, self.v_caches):
            ops.append_kv(k_cache[block, :, offset], v_cache[block, :, offset], k_cache, v_cache, target)

    def _context(self, batch: ForwardBatch) -> PagedContext:
        return PagedContext(
            k_caches=self.k_caches,
            v_caches=self.v_caches,
            block_table=batch.block_table,
            cu_seqlens_q=batch.cu_seqlens_q,
            context_lens=batch.context_lens,
            slot_mapping=batch.slot_mapping,
            tree_mask=batch.tree_mask,
        )

    def encode(self, batch: EncodeBatch) -> None:
        """Computes media embeddings, all in one pass of the tower, and keeps them under their names."""
        with torch.inference_mode(), self._forced():
            pixels = [part.to(self.model.device) for part in batch.pixel_values]
            packed = self.model.encode_media(pixels[0] if len(pixels) == 1 else torch.cat(pixels), batch.grids)
            merge = self.model.config.vision.spatial_merge_size
            parts = packed.split([grid.num_tokens(merge) for grid in batch.grids])
            # Copies: a view would keep the whole pack alive.
            self.media_embeds.update(zip(batch.names, [packed] if len(parts) == 1 else map(torch.clone, parts)))

    def forget(self, names: Iterable[bytes]) -> None:
        """Frees embeddings; names without any are passed over."""
        for name in names:
            self.media_embeds.pop(name, None)

    @property
    def num_media_bytes(self) -> int:
        return sum(embeds.nbytes for embeds in self.media_embeds.values())

    def _embed(self, batch: ForwardBatch) -> Tensor:
        """[T, H], media embeddings in the rows of their pad tokens."""
        if not batch.media:
            return self.model.embed(batch.token_ids)
        parts = [self.media_embeds[use.name][use.offset : use.offset + use.length] for use in batch.media]
        rows = torch.cat([torch.arange(use.first, use.first + use.length) for use in batch.media])
        return self.model.embed(batch.token_ids, torch.cat(parts), rows.to(batch.token_ids.device))


def _logit_names(batch: ForwardBatch) -> list[tuple[int, int]]:
    lengths = batch.context_lens.tolist()
    return [(row, length) for row, length, n in zip(batch.seq_ids, lengths, batch.num_samples) for _ in range(n)]


def _draw(logits: Tensor, sample: SampleBatch) -> tuple[list[int], list[dict[int, Logprob] | None]]:
    """logits [B, V] -> B tokens and, where asked for, log-probabilities."""
    tokens: list[int] = ops.sample(logits, *sample.settings.args(), None).tolist()
    logprobs = [_wanted_logprobs(row, token, count) for row, token, count in zip(logits, tokens, sample.num_logprobs)]
    return tokens, logprobs


def _wanted_logprobs(logits: Tensor, token: int, count: int | None) -> dict[int, Logprob] | None:
    return None if count is None or token < 0 else _logprobs(logits, token, count)


def _logprobs(logits: Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The drawn token and the `count` likeliest. logits [V]."""
    ids = [token, *logits.topk(min(count, logits.shape[0])).indices.tolist()]
    targets = torch.tensor(ids, device=logits.device)
    values = ops.token_logprobs(logits.expand(len(ids), -1), targets).tolist()
    found = {token: Logprob(values[0], int((logits > logits[token]).sum()) + 1)}
    for rank, (likely, value) in enumerate(zip(ids[1:], values[1:]), 1):
        found.setdefault(likely, Logprob(value, rank))
    return found


def _collect(
    batch: ForwardBatch, tokens: list[int], logprobs: list[dict[int, Logprob] | None], result: StepResult
) -> None:
    start = 0
    for seq_id, count in zip(batch.seq_ids, batch.num_samples):
        if count:
            result.tokens[seq_id] = tokens[start : start + count]
            result.logprobs[seq_id] = logprobs[start : start + count]
            start += count
