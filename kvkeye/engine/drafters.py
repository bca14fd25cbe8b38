"""Drafters without a model: what stood in the request, or in recent answers, after the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

from kvkeye.engine.draft import Draft
from kvkeye.engine.request import Sequence
from kvkeye.host import NgramIndex

MAX_CANDIDATES = 32
_TAIL = 32  # tokens of a row that are compared with other texts


class NgramDrafter:
    """Proposes from the row's own prompt and answer and, with `num_shared_tokens`, from recent answers of its salt.

    min_length, max_length  tokens that must match, and that are looked up
    width                   branches below one token, weighed by how often each followed
    num_shared_tokens       tokens of ended answers kept per salt; 0 keeps none
    """

    def __init__(self, min_length: int = 2, max_length: int = 5, width: int = 1, num_shared_tokens: int = 0) -> None:
        self.lengths = min_length, max_length
        self.width = width
        self.num_shared_tokens = num_shared_tokens
        self._own: dict[int, NgramIndex] = {}
        self._shared: dict[bytes, NgramIndex] = {}

    def propose(self, sequences: SequenceOf[Sequence], num_tokens: Mapping[int, int]) -> dict[int, Draft]:
        found = {}
        for seq in sequences:
            draft = self._propose(seq, num_tokens[seq.seq_id])
            if len(draft):
                found[seq.seq_id] = draft
        return found

    def _propose(self, seq: Sequence, count: int) -> Draft:
        index = self._own.get(seq.seq_id)
        if index is None:
            index = self._own[seq.seq_id] = self._new_index()
        if index.size < len(seq.tokens):
            index.append(seq.tokens[index.size :])
        draft = Draft(*index.propose(count, self.width))
        shared = self._shared.get(seq.request.salt)
        if shared is not None:
            other = Draft(*shared.propose_after(seq.tokens[-_TAIL:], count, self.width))
            if other.evidence > draft.evidence:
                return other
        return draft

    def _new_index(self) -> NgramIndex:
        return NgramIndex(*self.lengths, MAX_CANDIDATES)

    def forget(self, sequence: Sequence) -> None:
        self._own.pop(sequence.seq_id, None)
        if not self.num_shared_tokens or sequence.num_generated == 0:
            return
        shared = self._shared.setdefault(sequence.request.salt, self._new_index())
        shared.append([*sequence.tokens[sequence.num_prompt :], -1])
        if shared.size > 2 * self.num_shared_tokens:
            shared.keep_last(self.num_shared_tokens)
