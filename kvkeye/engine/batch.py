"""What passes take. Everything that attention needs travels in `ForwardBatch`; nothing is global.

Plain data; `assemble` fills it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Protocol

from torch import Tensor

from kvkeye.engine.prefix_cache import span_key
from kvkeye.engine.request import MediaSpan
from kvkeye.models.keye.positions import MediaGrid, MediaKind


class Media(Protocol):
    """A picture or clip as the processor prepares it; see kvkeye.models.keye.processor.MediaInput."""

    @property
    def kind(self) -> MediaKind: ...
    @property
    def pixel_values(self) -> Tensor: ...
    @property
    def grids(self) -> list[tuple[int, int, int]]: ...
    @property
    def key(self) -> bytes: ...
    @property
    def spans(self) -> list[tuple[int, int]]: ...


@dataclass(eq=False)
class Prompt:
    """The tensors of a request, carried as its payload.

    positions   [3, n] int64; a token generated at cache length m has position m + position_delta on all axes
    media       pictures and clips, in order
    parts       for each media span of the request: (index into media, index of the grid, its first patch)
    """

    positions: Tensor
    position_delta: int
    media: list[Media] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    @classmethod
    def build(cls, positions: Tensor, position_delta: int, media: list[Media]) -> tuple[Prompt, tuple[MediaSpan, ...]]:
        """The payload, and the spans that name the prompt's media for the caches.

        A span is what attends to itself and can be encoded alone: a picture, a Preview clip, a frame of a 1.5 clip.
        """
        found = []
        for item, content in enumerate(media):
            first = 0
            for index, ((start, length), grid) in enumerate(zip(content.spans, content.grids)):
                # Rotary positions belong to the content: the same pixels under another clock are other keys.
                places = positions[:, start : start + length].contiguous().numpy().tobytes()
                num_patches = math.prod(grid)
                key, embeds = span_key(content.key, index, places), span_key(content.key, index, b"")
                found.append((MediaSpan(start, length, key, embeds, num_patches), (item, index, first)))
                first += num_patches
        found.sort(key=lambda pair: pair[0].start)
        prompt = cls(positions, position_delta, list(media), [pair[1] for pair in found])
        return prompt, tuple(pair[0] for pair in found)

    def pixels(self, span: int) -> tuple[Tensor, MediaGrid]:
        """pixel_values [n, 588] and the grid of the media span of this number."""
        item, index, first = self.parts[span]
        media = self.media[item]
        grid = MediaGrid(media.kind, media.grids[index])
        return media.pixel_values[first : first + grid.num_patches], grid


@dataclass(frozen=True)
class EncodeBatch:
    """One pass of the encoder over media of any number of requests.

    names         of the embeddings, one per grid
    pixel_values  [n, 588] each
    """

    names: list[bytes]
    pixel_values: list[Tensor]
    grids: list[MediaGrid]


@dataclass(frozen=True)
class MediaUse:
    """Rows [first, first + length) of the step take rows [offset, offset + length) of the embeddings `name`."""

    name: bytes
    first: int
    offset: int
    length: int


@dataclass(frozen=True)
class DrawSettings:
    """How tokens are drawn, in the order of the arguments of ops.sample; see there. One entry per draw or tree."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    history: Tensor
    cu_history: Tensor
    num_prompt: Tensor
    seeds: Tensor
    positions: Tensor
    sample_index: Tensor

    def args(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in fields(self)]


@dataclass(frozen=True)
class SampleBatch:
    """Tokens to draw, one entry each. `rows` [B] picks the logits."""

    rows: Tensor
    settings: DrawSettings
    num_logprobs: list[int | None]


@dataclass(frozen=True)
class VerifyBatch:
    """Trees of proposals to check, by the arguments of ops.verify_draft; see there.

    rows           [R] int64, of the logits                   draft_tokens  [R] int64
    tree_parents   [R] int32                                  cu_rows       [B + 1] int32
    bounds         the same on the host
    tokens, slots  R numbers each: which of the step's tokens they are, and where their keys and values lie
    seq_ids, starts, num_logprobs    per tree
    """

    rows: Tensor
    draft_tokens: Tensor
    tree_parents: Tensor
    cu_rows: Tensor
    settings: DrawSettings
    bounds: list[int]
    tokens: list[int]
    slots: list[int]
    seq_ids: list[int]
    starts: list[int]
    num_logprobs: list[int | None]


@dataclass(frozen=True)
class TokenInputs:
    """What the decoder reads of a step of T new tokens of B rows.

    token_ids     [T] int64                positions     [3, T] int64
    block_table   [B, M] int32             cu_seqlens_q  [B + 1] int32
    context_lens  [B] int32, new tokens included         slot_mapping  [T] int64
    tree_mask     [T] int64, or None where every row sees all before it
    """

    token_ids: Tensor
    positions: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    slot_mapping: Tensor
    tree_mask: Tensor | None = None


@dataclass(frozen=True)
class ForwardBatch:
    """One forward pass over T new tokens of B rows. `inputs` come first: a recorded pass takes them as one piece.

    logit_rows    [R] int64 into T: the last tokens of the rows that get a next token, and all proposals
    block_copies  [n, 2] int64 (source, target)
    media_rows    [n] int64 into T: where `media` go, in their order
    seq_ids       B row ids
    bounds        cu_seqlens_q on the host
    lengths       of the rows' contexts, new tokens included
    num_samples   tokens to draw per row of the step; 0 for rows with proposals
    in_prompt     whether a row's first token belongs to its prompt
    verify        the rows with proposals, or None
    """

    inputs: TokenInputs
    logit_rows: Tensor
    block_copies: Tensor
    media_rows: Tensor
    seq_ids: list[int]
    bounds: list[int]
    lengths: list[int]
    num_samples: list[int]
    in_prompt: list[bool]
    media: list[MediaUse]
    sample: SampleBatch
    verify: VerifyBatch | None = None
