"""The forward pass: media embeddings, paged KV caches, logits, and the tokens drawn from them.

Knows tensors; must not know requests' lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import EncodeBatch, ForwardBatch, TokenInputs
from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.decode_graphs import DecodeGraphs, nothing
from kvkeye.engine.encoder_graphs import EncoderGraphs
from kvkeye.engine.graphs import Recorder
from kvkeye.engine.sampling import LogitsHook, StepResult, draw
from kvkeye.engine.staging import moved, sent, to_device
from kvkeye.layers import LargePages, PagedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import MediaGrid


class FeatureObserver(Protocol):
    """Sees what the layers make of every step; it changes nothing. See kvkeye.engine.draft_head."""

    @property
    def depths(self) -> tuple[int, ...]: ...
    def observe(self, batch: ForwardBatch, embeds: Tensor, features: Tensor, accepted: Mapping[int, list[int]]) -> None:
        """A step of T tokens is computed. The next one may overwrite its tensors, which may have rows behind T.

        embeds    [T, H] of its tokens, media merged in
        features  [T, n H]: the residual stream behind the n layers `depths`, side by side
        accepted  StepResult.accepted
        """
        ...


class Runner:
    """One model with its caches. `backends` orders op implementations for everything that runs here.

    cache_dtype  what keys and values are kept in, the model's dtype unless given; float8_e4m3fn comes with scales
    """

    def __init__(
        self,
        model: KeyeModel,
        num_blocks: int,
        block_size: int,
        backends: str = "",
        observer: FeatureObserver | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.backends = backends
        self.observer = observer
        self._choices: ops.Choices = {}
        self.media_embeds: dict[bytes, Tensor] = {}  # [tokens, hidden] by name; the scheduler says what stays
        self.logits_hook: LogitsHook | None = None
        self._graphs: DecodeGraphs | None = None
        self._encoder_graphs: EncoderGraphs | None = None
        text = model.config.text
        shape = (num_blocks, text.num_key_value_heads, block_size, text.head_dim)
        held = cache_dtype or model.dtype
        self.has_scales = held == torch.float8_e4m3fn

        memory = LargePages()

        def of_layers(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [memory.zeros(shape, dtype, model.device) for _ in range(text.num_hidden_layers)]

        self.k_caches, self.v_caches = of_layers(shape, held), of_layers(shape, held)
        self.k_scales, self.v_scales = (
            of_layers(shape[:3], torch.float32) if self.has_scales else [] for _ in range(2)
        )

    def _forced(self) -> AbstractContextManager[None]:
        return ops.settle(self._choices, self.backends)

    def record(self, sizes: SequenceOf[int], width: int, record: Recorder, trees: bool = False) -> None:
        """Records steps of so many tokens over tables of `width` blocks; later steps are replays where they fit."""
        text = self.model.config.text
        widths = [text.vocab_size]
        if self.observer is not None:
            widths += [text.hidden_size, text.hidden_size * len(self.observer.depths)]
        outputs = [torch.zeros(sizes[-1], n, dtype=self.model.dtype, device=self.model.device) for n in widths]
        with torch.inference_mode(), self._forced():
            self._graphs = DecodeGraphs(self._all_rows, outputs, sizes, width, record, trees)

    def record_encoder(self, sizes: SequenceOf[int], record: Recorder) -> None:
        """Records encoder passes of up to so many patches; later ones are replays where they fit."""
        with torch.inference_mode(), self._forced():
            self._encoder_graphs = EncoderGraphs(self.model, sizes, record)

    def rehearse(self, num_tokens: int, num_rows: int, num_patches: int) -> None:
        """Runs a step of so many tokens, so many rows with logits, and an encoder pass; both leave nothing behind."""
        with torch.inference_mode(), self._forced():
            inputs, _ = to_device(nothing(num_tokens), self.model.device)
            hidden, *_ = self._decode(self.model.embed(inputs.token_ids), inputs)
            self.model.logits(hidden[:num_rows])
            vision = self.model.config.vision
            side = vision.spatial_merge_size
            grid = MediaGrid("image", (1, side, side * ceil_div(num_patches, side**2)))
            pixels = torch.zeros(grid.num_patches, vision.patch_dim, dtype=self.model.dtype, device=self.model.device)
            self.model.encode_media(pixels, [grid])

    def run(self, batch: ForwardBatch) -> StepResult:
        """Computes a step: caches get the keys and values of its tokens, rows that are due get their next tokens."""
        with torch.inference_mode(), self._forced():
            batch, logits, seen = self._computed(batch)
            result = draw(batch, logits, self.logits_hook)
            if result.moves:
                self._move_slots(result.moves)
            if self.observer is not None:
                embeds, features = seen
                self.observer.observe(batch, embeds, features, result.accepted)
            return result

    def _computed(self, batch: ForwardBatch) -> tuple[ForwardBatch, Tensor, list[Tensor]]:
        """The batch on the device, the logits [R, V] of its `logit_rows`, and what an observer sees."""
        graphs = self._graphs
        fitting = graphs.fit(batch) if graphs is not None else None
        if graphs is not None and fitting is not None:
            is_whole = len(batch.logit_rows) == len(batch.inputs.token_ids)
            batch, packed = to_device(fitting, self.model.device)
            self._copy_blocks(batch)
            logits, *seen = graphs(batch.inputs, packed)
            return batch, logits[: len(batch.logit_rows)] if is_whole else logits[batch.logit_rows], seen
        batch = self._on_device(batch)
        hidden, *seen = self._decode(self._embed(batch), batch.inputs)
        return batch, self.model.logits(hidden[batch.logit_rows]), seen

    def _on_device(self, batch: ForwardBatch) -> ForwardBatch:
        """The batch where the model is, its blocks copied."""
        if self.model.device.type != "cpu":
            batch, _ = to_device(batch, self.model.device)
        self._copy_blocks(batch)
        return batch

    def _decode(self, embeds: Tensor, inputs: TokenInputs) -> list[Tensor]:
        """Hidden states [T, H] and, for an observer, the embeddings [T, H] and the features [T, n H]."""
        context = self._context(inputs)
        if self.observer is None:
            return [self.model(embeds, inputs.positions, context)]
        depths = self.observer.depths
        hidden, features = self.model.language.forward_features(embeds, inputs.positions, context, depths)
        return [hidden, embeds, torch.cat(features, -1)]

    def _all_rows(self, inputs: TokenInputs) -> list[Tensor]:
        """Logits [T, V] of every token of a step without media, and what an observer sees."""
        hidden, *seen = self._decode(self.model.embed(inputs.token_ids), inputs)
        return [self.model.logits(hidden), *seen]

    def _slots(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All that slots hold, as pairs [N, Hkv, P, X] that move without a change: e4m3 as bytes, then its scales."""
        for k_cache, v_cache in zip(self.k_caches, self.v_caches):
            yield (k_cache.view(torch.uint8), v_cache.view(torch.uint8)) if self.has_scales else (k_cache, v_cache)
        for k_scales, v_scales in zip(self.k_scales, self.v_scales):
            yield k_scales[..., None], v_scales[..., None]

    def _copy_blocks(self, batch: ForwardBatch) -> None:
        if len(batch.block_copies):
            for keys, values in self._slots():
                ops.copy_blocks(keys, values, batch.block_copies)

    def _move_slots(self, moves: list[tuple[int, int]]) -> None:
        """Copies keys and values of single tokens (source, target); sources are read before targets are written."""
        source, target = sent(moves, torch.int64, self.model.device).unbind(1)
        block_size = self.k_caches[0].shape[2]
        block, offset = source // block_size, source % block_size
        for keys, values in self._slots():
            ops.append_kv(keys[block, :, offset], values[block, :, offset], keys, values, target)

    def _context(self, inputs: TokenInputs) -> PagedContext:
        return PagedContext(
            k_caches=self.k_caches,
            v_caches=self.v_caches,
            block_table=inputs.block_table,
            cu_seqlens_q=inputs.cu_seqlens_q,
            context_lens=inputs.context_lens,
            slot_mapping=inputs.slot_mapping,
            tree_mask=inputs.tree_mask,
            k_scales=self.k_scales,
            v_scales=self.v_scales,
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
        return self.model.encode_media(moved(pixels, self.model.device), batch.grids)

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
