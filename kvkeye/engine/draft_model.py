"""A small model as a drafter: it shares the tokenizer, keeps a cache of its own and proposes its likeliest tokens.

It sees the text and the positions of a prompt; of media only that something is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.batch import Prompt
from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.draft import Draft
from kvkeye.engine.request import Sequence
from kvkeye.engine.staging import moved, read, sent
from kvkeye.host import BlockPool
from kvkeye.layers import LargePages, PagedContext
from kvkeye.models.keye.model import KeyeModel

_MAX_CHUNK = 512  # tokens of one row that are computed in a pass; a row further behind proposes nothing in that step


@dataclass(eq=False)
class _Row:
    """`tokens` are those whose keys and values lie in `blocks`; proposals that were wrong are overwritten."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def keep_prefix(self, tokens: SequenceOf[int]) -> None:
        """Forgets what does not begin `tokens`; at least the last of these is computed anew."""
        length = min(len(self.tokens), len(tokens) - 1)
        while self.tokens[:length] != tokens[:length]:
            length -= 1
        del self.tokens[length:]


class DraftModel:
    """Greedy chains of `model`, all rows in one pass per token. Rows without room in the cache propose nothing."""

    def __init__(self, model: KeyeModel, num_blocks: int, block_size: int = 32, backends: str = "") -> None:
        self.model, self.block_size, self.backends = model, block_size, backends
        self.pool = BlockPool(num_blocks)
        text = model.config.text
        shape = (num_blocks, text.num_key_value_heads, block_size, text.head_dim)
        memory = LargePages()
        self.k_caches, self.v_caches = (
            [memory.zeros(shape, model.dtype, model.device) for _ in range(text.num_hidden_layers)] for _ in range(2)
        )
        self._rows: dict[int, _Row] = {}

    def propose(self, sequences: SequenceOf[Sequence], num_tokens: Mapping[int, int]) -> dict[int, Draft]:
        with torch.inference_mode(), self._forced():
            active = [seq for seq in sequences if self._catch_up(seq, num_tokens[seq.seq_id])]
            texts = {seq.seq_id: list(seq.tokens) for seq in active}
            drafts = {seq.seq_id: Draft() for seq in active}
            while active:
                for seq, (token, score) in zip(active, self._next(active, texts)):
                    draft = drafts[seq.seq_id]
                    draft.scores.append(score * (draft.scores[-1] if draft.scores else 1.0))
                    draft.parents.append(len(draft.tokens))
                    draft.tokens.append(token)
                    texts[seq.seq_id].append(token)
                active = [seq for seq in active if len(drafts[seq.seq_id]) < num_tokens[seq.seq_id]]
        return drafts

    def forget(self, sequence: Sequence) -> None:
        row = self._rows.pop(sequence.seq_id, None)
        for block in row.blocks if row is not None else ():
            self.pool.release(block)

    def _forced(self) -> AbstractContextManager[None]:
        return ops.use_backends(self.backends) if self.backends else nullcontext()

    def _catch_up(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room, and computes long prompts chunk by chunk; whether the row can propose in this step."""
        row = self._rows.setdefault(seq.seq_id, _Row())
        row.keep_prefix(seq.tokens)
        missing = ceil_div(len(seq.tokens) + num_tokens, self.block_size) - len(row.blocks)
        if missing > self.pool.num_available:
            return False
        row.blocks += self.pool.allocate(max(0, missing))
        if len(seq.tokens) - len(row.tokens) > _MAX_CHUNK:
            self._forward([seq], {seq.seq_id: seq.tokens[: len(row.tokens) + _MAX_CHUNK]})
            return False
        return True

    def _next(self, sequences: list[Sequence], texts: Mapping[int, list[int]]) -> Iterator[tuple[int, float]]:
        """Per row the likeliest token after its text, and its probability."""
        logits = self.model.logits(self._forward(sequences, texts)).float()  # [B, V]
        values, tokens = logits.max(-1)
        found, chances = read([tokens, torch.exp(values - logits.logsumexp(-1))])
        return zip(map(int, found), chances)

    def _forward(self, sequences: list[Sequence], texts: Mapping[int, list[int]]) -> Tensor:
        """Computes what is missing of the texts; hidden states of their last tokens [B, H]."""
        rows = [self._rows[seq.seq_id] for seq in sequences]
        fresh = [texts[seq.seq_id][len(row.tokens) :] for seq, row in zip(sequences, rows)]
        positions = [_positions(seq, len(row.tokens), len(new)) for seq, row, new in zip(sequences, rows, fresh)]
        slots = [slot for row, new in zip(rows, fresh) for slot in self._slots(row, len(new))]
        for row, new in zip(rows, fresh):
            row.tokens += new
        bounds = list(accumulate(map(len, fresh), initial=0))
        width, device = max(len(row.blocks) for row in rows), self.model.device
        context = PagedContext(
            k_caches=self.k_caches,
            v_caches=self.v_caches,
            block_table=sent([row.blocks + [0] * (width - len(row.blocks)) for row in rows], torch.int32, device),
            cu_seqlens_q=sent(bounds, torch.int32, device),
            context_lens=sent([len(row.tokens) for row in rows], torch.int32, device),
            slot_mapping=sent(slots, torch.int64, device),
        )
        tokens = sent([token for new in fresh for token in new], torch.int64, device)
        at = moved(torch.cat(positions, dim=1), device)  # [3, T]
        hidden: Tensor = self.model(self.model.embed(tokens), at, context)  # [T, H]
        return hidden[sent([end - 1 for end in bounds[1:]], torch.int64, device)]

    def _slots(self, row: _Row, count: int) -> Iterator[int]:
        for position in range(len(row.tokens), len(row.tokens) + count):
            yield row.blocks[position // self.block_size] * self.block_size + position % self.block_size


def _positions(seq: Sequence, start: int, count: int) -> Tensor:
    """[3, count]: those of the prompt, then one step per token on all axes."""
    prompt: Prompt = seq.request.payload
    end, first = start + count, max(start, seq.num_prompt)
    later = torch.arange(first, max(first, end)) + prompt.position_delta
    return torch.cat([prompt.positions[:, start : min(end, seq.num_prompt)], later.expand(3, -1)], dim=1)
