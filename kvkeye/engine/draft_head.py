"""An EAGLE-3 style head as a drafter (Li et al. 2025): it continues what the target's layers made of the text.

Its keys and values lie in the target's blocks, at a token's own place, and follow from the tokens up to there: they are
shared by the prefix cache, copied with a block and recomputed after a preemption as the target's are. Proposals lie
behind them, in blocks of its own where the row has none yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import ForwardBatch, Prompt
from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.draft import Draft
from kvkeye.engine.request import Sequence
from kvkeye.engine.staging import sent
from kvkeye.layers import LargePages
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.keye.model import KeyeModel

_MAX_PENDING = 64  # tokens of a row that has not been asked for long; older ones stay unknown to the head


@dataclass
class _Row:
    """features [n, 3 H] of the row's newest computed tokens, the last of which is at position `end` - 1.

    All but the first belong to tokens that the head has not seen yet.
    """

    end: int
    features: Tensor


@dataclass(frozen=True)
class _Kept:
    """A row that ends at `end` now keeps the features of the step's tokens `places` behind those `known`."""

    seq_id: int
    end: int
    places: list[int]
    known: Tensor | None


class HeadDrafter:
    """Trees of the head's likeliest tokens, as deep as they are likely enough.

    width      nodes of a level at most; 1 proposes chains
    min_score  nodes that are reached and drawn with a lower chance are left out
    """

    def __init__(self, head: DraftHead, target: KeyeModel, width: int = 1, min_score: float = 0.3) -> None:
        self.head, self.target, self.width, self.min_score = head, target, width, min_score
        self.depths = head.config.feature_layers
        self._rows: dict[int, _Row] = {}

    def block_bytes(self, block_size: int) -> int:
        """Bytes of its keys and values in one block."""
        config = self.head.config
        return 2 * config.num_key_value_heads * config.head_dim * block_size * self.head.dtype.itemsize

    def fixed_bytes(self, block_size: int, max_num_seqs: int, num_tokens: int) -> int:
        """Bytes of everything else that `allocate` takes."""
        config = self.head.config
        vocabulary = config.draft_vocab_size * config.hidden_size * self.head.dtype.itemsize
        return vocabulary + max_num_seqs * self._num_spare(block_size, num_tokens) * self.block_bytes(block_size)

    def _num_spare(self, block_size: int, num_tokens: int) -> int:
        """Blocks behind a row's own: they hold its last token, which is computed again, and the proposals."""
        return ceil_div(max(num_tokens, self.width) + 1, block_size)

    def allocate(self, num_blocks: int, block_size: int, max_num_seqs: int, num_tokens: int, backends: str) -> None:
        """Caches beside a target's of `num_blocks`, with room for `num_tokens` proposals of every row."""
        # Its bits decide nothing, so what has no kernel in this order may run without one.
        self.backends = f"{backends},eager" if backends else ""
        self.depth = max(1, num_tokens // self.width)
        with torch.inference_mode(), self._forced():
            self.weights, self.vocabulary = self.head.parts(), self.target.embed(self.head.token_ids)
        self.num_blocks, self.num_spare = num_blocks, self._num_spare(block_size, num_tokens)
        config = self.head.config
        shape = (num_blocks + max_num_seqs * self.num_spare, config.num_key_value_heads, block_size, config.head_dim)
        memory = LargePages()
        self.k_cache, self.v_cache = (memory.zeros(shape, self.head.dtype, self.target.device) for _ in range(2))

    def forget(self, sequence: Sequence) -> None:
        self._rows.pop(sequence.seq_id, None)

    def _forced(self) -> AbstractContextManager[None]:
        return ops.use_backends(self.backends) if self.backends else nullcontext()

    # What the target computes

    def observe(self, batch: ForwardBatch, embeds: Tensor, features: Tensor, accepted: Mapping[int, list[int]]) -> None:
        """See FeatureObserver. Keeps copies of what the next proposals begin with."""
        if len(batch.block_copies):
            ops.copy_blocks(self.k_cache, self.v_cache, batch.block_copies)
        kept: list[_Kept] = []
        chunks: list[tuple[int, int, Tensor | None]] = []
        for seq_id, first, last, end, in_prompt in zip(
            batch.seq_ids, batch.bounds, batch.bounds[1:], batch.lengths, batch.in_prompt
        ):
            row, start = self._rows.get(seq_id), end - (last - first)
            known = row.features if row is not None and row.end == start else None
            if seq_id in accepted:
                kept.append(_Kept(seq_id, start + len(accepted[seq_id]), accepted[seq_id], known))
            elif known is not None and last - first == 1 and not in_prompt:
                kept.append(_Kept(seq_id, end, [first], known))
            else:
                chunks.append((first, last, None if known is None else known[-1:]))
                kept.append(_Kept(seq_id, end, [last - 1], None))
        places = [place for row in kept for place in row.places]
        newest = features[sent(places, torch.int64, features.device)].split([len(row.places) for row in kept])
        for old, new in zip(kept, newest):
            own = new if old.known is None else torch.cat([old.known, new])[-_MAX_PENDING:]
            self._rows[old.seq_id] = _Row(old.end, own)
        if chunks:
            self._write(batch, embeds, features, chunks)

    def _write(
        self, batch: ForwardBatch, embeds: Tensor, features: Tensor, chunks: list[tuple[int, int, Tensor | None]]
    ) -> None:
        """Keys and values of whole chunks of prompts: (first row, end, features before it) each."""
        nothing = features.new_zeros(1, features.shape[1])
        before = [
            part
            for first, last, known in chunks
            for part in (nothing if known is None else known, features[first : last - 1])
        ]
        places = [place for first, last, _ in chunks for place in range(first, last)]
        rows = sent(places, torch.int64, features.device)
        layer, attention = self.head.midlayer, self.head.midlayer.self_attn
        x = layer.join(self.head.fuse(torch.cat(before)), embeds[rows])
        ops.qk_norm_mrope_append(
            attention.qkv_proj(x), attention.q_norm, attention.k_norm, batch.inputs.positions[:, rows], self.k_cache,
            self.v_cache, batch.inputs.slot_mapping[rows], attention.sections, attention.rope_theta, attention.eps,
        )  # fmt: skip

    # Proposals

    def propose(self, sequences: SequenceOf[Sequence], num_tokens: Mapping[int, int]) -> dict[int, Draft]:
        ready = [seq for seq in sequences if self._is_ready(seq)]
        if not ready:
            return {}
        with torch.inference_mode(), self._forced():
            return self._trees(ready, [num_tokens[seq.seq_id] for seq in ready])

    def _is_ready(self, seq: Sequence) -> bool:
        row = self._rows.get(seq.seq_id)
        is_decoding = seq.num_remaining == 1 and seq.num_generated > 0
        return is_decoding and row is not None and row.end == seq.num_computed

    def _trees(self, sequences: list[Sequence], limits: list[int]) -> dict[int, Draft]:
        rows = [self._rows[seq.seq_id] for seq in sequences]
        counts = [len(row.features) for row in rows]
        tokens: list[int] = []
        positions: list[int] = []
        for seq, count in zip(sequences, counts):
            prompt: Prompt = seq.request.payload
            tokens += seq.tokens[-count:]
            end = len(seq.tokens) + prompt.position_delta
            positions += range(end - count, end)

        device = self.target.device
        nodes, places, scores = ops.draft_tree(
            rows[0].features if len(rows) == 1 else torch.cat([row.features for row in rows]),
            self.target.embed(sent(tokens, torch.int64, device)), self.vocabulary, self.weights, self.k_cache,
            self.v_cache, self._tables(sequences), sent([0, *accumulate(counts)], torch.int32, device),
            sent([len(seq.tokens) for seq in sequences], torch.int32, device), sent(positions, torch.int64, device),
            *self.head.sizes, min(max(limits), self.depth), self.width, self.min_score,
        )  # fmt: skip
        for row in rows:
            row.features = row.features[-1:]  # the last token may lie in a spare block: it is computed again
        ids = self.head.token_ids[nodes].where(nodes >= 0, -1)
        read = torch.stack((ids.double(), places.double(), scores.double()), 1).tolist()  # exact in fp64: one read
        drafts = {}
        for seq, limit, (names, above, chances) in zip(sequences, limits, read):
            count = names.index(-1) if -1 in names else len(names)
            if count:
                tokens, parents = list(map(int, names[:count])), list(map(int, above[:count]))
                drafts[seq.seq_id] = _branches_first(tokens, parents, chances[:count]).trimmed(limit, limit)
        return drafts

    def _tables(self, sequences: list[Sequence]) -> Tensor:
        """[B, M]: the rows' blocks, and behind them the spare ones of their place in the batch."""
        width = max(len(seq.block_table) for seq in sequences) + self.num_spare
        tables = []
        for index, seq in enumerate(sequences):
            spare = self.num_blocks + index * self.num_spare
            table = [*seq.block_table, *range(spare, spare + self.num_spare)]
            tables.append(table + [0] * (width - len(table)))
        return sent(tables, torch.int32, self.target.device)


def _branches_first(tokens: list[int], parents: list[int], scores: list[float]) -> Draft:
    """A tree given level by level, parents as numbers of nodes or -1, in a Draft's order."""
    draft = Draft()
    children: list[list[int]] = [[] for _ in range(len(tokens) + 1)]
    for node, parent in enumerate(parents):
        children[parent + 1].append(node)
    ahead = [(node, 0) for node in reversed(children[0])]  # a node, and where its parent stands in the draft
    while ahead:
        node, parent = ahead.pop()
        draft.tokens.append(tokens[node])
        draft.parents.append(parent)
        draft.scores.append(scores[node])
        ahead += [(child, len(draft)) for child in reversed(children[node + 1])]
    return draft
