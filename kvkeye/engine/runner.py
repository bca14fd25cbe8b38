"""The forward pass: media embeddings, paged KV caches, logits, sampling.

Knows tensors; must not know requests' lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import EncodeBatch, ForwardBatch, SampleBatch, TokenInputs, VerifyBatch
from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.decode_graphs import DecodeGraphs, nothing
from kvkeye.engine.encoder_graphs import EncoderGraphs
from kvkeye.engine.graphs import Recorder
from kvkeye.engine.outputs import Logprob
from kvkeye.engine.staging import to_device
from kvkeye.layers import PagedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import MediaGrid

# Called with (row id, tokens before the drawn one) per drawn token and the logits [R, V] in the model's dtype. The next
# step may overwrite them.
LogitsHook = Callable[[list[tuple[int, int]], Tensor], None]


class FeatureObserver(Protocol):
    """Sees what the layers make of every step; it changes nothing. See kvkeye.engine.draft_head."""

    @property
    def depths(self) -> tuple[int, ...]: ...
    def observe(
        self, batch: ForwardBatch, embeds: Tensor, features: list[Tensor], accepted: Mapping[int, list[int]]
    ) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """Per row id: the drawn tokens, -1 for a row without valid probabilities, and their log-probabilities if wanted.

    After proposals these are one answer's next tokens, all but the last of them proposed; `accepted` are the rows of
    its tree from which they were drawn.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[dict[int, Logprob] | None]] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)


class Runner:
    """One model with its caches. `backends` orders op implementations for everything that runs here."""

    def __init__(self, model: KeyeModel, num_blocks: int, block_size: int, backends: str = "") -> None:
        self.model = model
        self.backends = backends
        self._choices: ops.Choices = {}
        self.media_embeds: dict[bytes, Tensor] = {}  # [tokens, hidden] by name; the scheduler says what stays
        self.logits_hook: LogitsHook | None = None
        self.observer: FeatureObserver | None = None
        self._graphs: DecodeGraphs | None = None
        self._encoder_graphs: EncoderGraphs | None = None
        text = model.config.text
        shape = (num_blocks, text.num_key_value_heads, block_size, text.head_dim)
        layers = range(text.num_hidden_layers)
        self.k_caches = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.v_caches = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in layers]

    def _forced(self) -> AbstractContextManager[None]:
        return ops.settle(self._choices, self.backends)

    def record(self, sizes: SequenceOf[int], width: int, record: Recorder, trees: bool = False) -> None:
        """Records steps of so many tokens over tables of `width` blocks; later steps are replays where they fit."""
        output = torch.zeros(
            sizes[-1], self.model.config.text.vocab_size, dtype=self.model.dtype, device=self.model.device
        )
        with torch.inference_mode(), self._forced():
            self._graphs = DecodeGraphs(self._all_logits, output, sizes, width, record, trees)

    def record_encoder(self, sizes: SequenceOf[int], record: Recorder) -> None:
        """Records encoder passes of up to so many patches; later ones are replays where they fit."""
        with torch.inference_mode(), self._forced():
            self._encoder_graphs = EncoderGraphs(self.model, sizes, record)

    def rehearse(self, num_tokens: int, num_rows: int, num_patches: int) -> None:
        """Runs a step of so many tokens, so many rows with logits, and an encoder pass; both leave nothing behind."""
        with torch.inference_mode(), self._forced():
            inputs, _ = to_device(nothing(num_tokens), self.model.device)
            hidden = self.model(self.model.embed(inputs.token_ids), inputs.positions, self._context(inputs))
            self.model.logits(hidden[:num_rows])
            vision = self.model.config.vision
            side = vision.spatial_merge_size
            grid = MediaGrid("image", (1, side, side * ceil_div(num_patches, side**2)))
            pixels = torch.zeros(grid.num_patches, vision.patch_dim, dtype=self.model.dtype, device=self.model.device)
            self.model.encode_media(pixels, [grid])

    def run(self, batch: ForwardBatch) -> StepResult:
        """Computes a step: caches get the keys and values of its tokens, rows that are due get their next tokens."""
        with torch.inference_mode(), self._forced():
            if self.observer is not None:
                return self._observed(batch, self.observer)
            return self._drawn(*self._logits(batch))

    def _observed(self, batch: ForwardBatch, observer: FeatureObserver) -> StepResult:
        """A step whose features are seen; it is never a replay."""
        batch = self._on_device(batch)
        embeds = self._embed(batch)  # [T, H]
        hidden, features = self.model.language.forward_features(
            embeds, batch.inputs.positions, self._context(batch.inputs), observer.depths
        )
        result = self._drawn(batch, self.model.logits(hidden[batch.logit_rows]))
        observer.observe(batch, embeds, features, result.accepted)
        return result

    def _drawn(self, batch: ForwardBatch, logits: Tensor) -> StepResult:
        """The tokens that are due, from logits [R, V]."""
        result = StepResult()
        if not len(batch.logit_rows):
            return result
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

    def _logits(self, batch: ForwardBatch) -> tuple[ForwardBatch, Tensor]:
        """The batch on the device, and the logits [R, V] of its `logit_rows`."""
        graphs = self._graphs
        fitting = graphs.fit(batch) if graphs is not None else None
        if graphs is not None and fitting is not None:
            is_whole = len(batch.logit_rows) == len(batch.inputs.token_ids)
            batch, packed = to_device(fitting, self.model.device)
            self._copy_blocks(batch)
            logits = graphs(batch.inputs, packed)
            return batch, logits[: len(batch.logit_rows)] if is_whole else logits[batch.logit_rows]
        batch = self._on_device(batch)
        hidden = self.model(self._embed(batch), batch.inputs.positions, self._context(batch.inputs))  # [T, H]
        return batch, self.model.logits(hidden[batch.logit_rows])

    def _on_device(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch where the model is, its blocks copied."""
        if self.model.device.type != "cpu":
            batch, _ = to_device(batch, self.model.device)
        self._copy_blocks(batch)
        return batch

    def _all_logits(self, inputs: TokenInputs) -> Tensor:
        """[T, V]: of every token of a step without media."""
        hidden = self.model(self.model.embed(inputs.token_ids), inputs.positions, self._context(inputs))  # [T, H]
        return self.model.logits(hidden)

    def _copy_blocks(self, batch: ForwardBatch) -> None:
        if len(batch.block_copies):
            for k_cache, v_cache in zip(self.k_caches, self.v_caches):
                ops.copy_blocks(k_cache, v_cache, batch.block_copies)

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
            result.accepted[seq_id] = [row - first for row in rows]
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

    def _context(self, inputs: TokenInputs) -> PagedContext:
        return PagedContext(
            k_caches=self.k_caches,
            v_caches=self.v_caches,
            block_table=inputs.block_table,
            cu_seqlens_q=inputs.cu_seqlens_q,
            context_lens=inputs.context_lens,
            slot_mapping=inputs.slot_mapping,
            tree_mask=inputs.tree_mask,
        )

    def encode(self, batch: EncodeBatch) -> None:
        """Computes media embeddings, all in one pass of the tower, and keeps them under their names."""
        with torch.inference_mode(), self._forced():
            recorded = self._encoder_graphs(batch) if self._encoder_graphs is not None else None
            packed = self._encode(batch) if recorded is None else recorded
            merge = self.model.config.vision.spatial_merge_size
            parts = packed.split([grid.num_tokens(merge) for grid in batch.grids])
            # Copies: a view would keep the whole pack alive, or be overwritten by the next one.
            is_own = recorded is None and len(parts) == 1
            self.media_embeds.update(zip(batch.names, [packed] if is_own else map(torch.clone, parts)))

    def _encode(self, batch: EncodeBatch) -> Tensor:
        pixels = torch.cat(batch.pixel_values) if len(batch.pixel_values) > 1 else batch.pixel_values[0]
        if self.model.device.type != "cpu":
            pixels = pixels.pin_memory().to(self.model.device, non_blocking=True)
        return self.model.encode_media(pixels, batch.grids)

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
            return self.model.embed(batch.inputs.token_ids)
        parts = [self.media_embeds[use.name][use.offset : use.offset + use.length] for use in batch.media]
        return self.model.embed(batch.inputs.token_ids, torch.cat(parts), batch.media_rows)


def _logit_names(batch: ForwardBatch) -> list[tuple[int, int]]:
    return [(row, length) for row, length, n in zip(batch.seq_ids, batch.lengths, batch.num_samples) for _ in range(n)]


def _draw(logits: Tensor, sample: SampleBatch) -> tuple[list[int], list[dict[int, Logprob] | None]]:
    """logits [B, V] -> B tokens and, where asked for, log-probabilities. The host waits once, for all of it."""
    drawn = ops.sample(logits, *sample.settings.args(), None)
    wanted = [i for i, count in enumerate(sample.num_logprobs) if count is not None]
    if not wanted:
        return drawn.tolist(), [None] * len(drawn)
    ranked = [_ranked(logits[i], drawn[i : i + 1], sample.num_logprobs[i] or 0) for i in wanted]
    read = iter(torch.cat((drawn.double(), *ranked)).tolist())  # fp64 holds ids and fp32 exactly
    tokens = list(map(int, islice(read, len(drawn))))
    named = {i: _named(list(islice(read, len(part)))) for i, part in zip(wanted, ranked)}
    return tokens, [named.get(i) if token >= 0 else None for i, token in enumerate(tokens)]


def _wanted_logprobs(logits: Tensor, token: int, count: int | None) -> dict[int, Logprob] | None:
    if count is None or token < 0:
        return None
    return _named(_ranked(logits, torch.tensor([token]).to(logits.device), count).tolist())


def _ranked(logits: Tensor, token: Tensor, count: int) -> Tensor:
    """Rank of a drawn token, then it and the `count` likeliest, then their log-probabilities: [1 + 2 n] fp64.

    logits [V], token [1]; -1 gives something that nobody reads.
    """
    token = token.clamp(min=0)
    ids = torch.cat((token, logits.topk(min(count, logits.shape[0])).indices))  # [n]
    values = ops.token_logprobs(logits.expand(len(ids), -1), ids)
    rank = (logits > logits[token]).sum().view(1) + 1
    return torch.cat((rank.double(), ids.double(), values.double()))


def _named(ranked: list[float]) -> dict[int, Logprob]:
    """What `_ranked` found, by token."""
    count = len(ranked) // 2
    ids, values = ranked[1 : 1 + count], ranked[1 + count :]
    found = {int(ids[0]): Logprob(values[0], int(ranked[0]))}
    for rank, (token, value) in enumerate(zip(ids[1:], values[1:]), 1):
        found.setdefault(int(token), Logprob(value, rank))
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
