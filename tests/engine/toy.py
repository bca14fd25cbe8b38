"""A model without tensors whose "attention" hashes what it saw through the block tables.

A slot holds (token, media key, state); the state of position i is the hash of every slot before i, states included,
and of token i. One stale, foreign or unwritten slot changes every later token, and `expected_tokens` computes the
truth from the request alone. Its "encoder" keeps names; a token of media whose name is not kept is refused.
"""

from __future__ import annotations

import hashlib

from kvkeye.engine.request import Request, Sequence
from kvkeye.engine.scheduler import Scheduler
from kvkeye.engine.step import Row, Step

VOCAB = 50


def _media_key(request: Request, position: int) -> bytes:
    for span in request.media_between(position, position + 1):
        return span.key + str(position - span.start).encode()
    return b""


def _state(previous: list[tuple[int, bytes, bytes]], token: int, media: bytes, salt: bytes) -> bytes:
    digest = hashlib.sha256(salt)
    for slot in previous:
        digest.update(repr(slot).encode())
    digest.update(repr((token, media)).encode())
    return digest.digest()[:8]


def draw(state: bytes, seed: int, index: int, position: int) -> int:
    digest = hashlib.sha256(state + repr((seed, index, position)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % VOCAB


class ToyModel:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache: list[list[tuple[int, bytes, bytes] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.embeds: set[bytes] = set()

    def encode(self, scheduler: Scheduler, step: Step) -> None:
        for encoding in step.encodings:
            span = scheduler.sequence(encoding.seq_id).request.media[encoding.index]
            assert (span.embeds, span.num_patches) == (encoding.embeds, encoding.num_patches)
            assert encoding.embeds not in self.embeds, "encoded twice"
            self.embeds.add(encoding.embeds)

    def run(self, scheduler: Scheduler, step: Step) -> dict[int, list[int]]:
        targets = [target for _, target in step.block_copies]
        assert len(set(targets)) == len(targets)
        assert not set(targets) & {source for source, _ in step.block_copies}, "copies must not depend on their order"
        for source, target in step.block_copies:
            self.cache[target] = list(self.cache[source])
        written: dict[int, int] = {}
        sampled = {}
        for row in step.rows:
            seq = scheduler.sequence(row.seq_id)
            first, last = row.start // self.block_size, (row.start + len(row.tokens) - 1) // self.block_size
            for block in row.block_table[first : last + 1]:
                assert written.setdefault(block, row.seq_id) == row.seq_id, "two rows write one block"
            run = self._run_tree if row.parents else self._run_row
            sampled[row.seq_id] = run(seq, row)
        for row in step.rows:
            reads = row.block_table[: row.start // self.block_size]
            assert not any(written.get(block, row.seq_id) != row.seq_id for block in reads), "a read block is written"
        return sampled

    def _run_row(self, seq: Sequence, row: Row) -> list[int]:
        state, end = self._known(seq, row, len(row.tokens)), row.start + len(row.tokens)
        return [draw(state, seq.request.seed, seq.index + i, end) for i in range(row.num_samples)]

    def _known(self, seq: Sequence, row: Row, num_tokens: int) -> bytes:
        """Writes the row's first tokens; the state of the last."""
        state = b""
        for position, token in enumerate(row.tokens[:num_tokens], row.start):
            seen = [self._slot(row.block_table, past) for past in range(position)]
            media = _media_key(seq.request, position)
            for span in seq.request.media_between(position, position + 1):
                assert not span.num_patches or span.embeds in self.embeds, "a token came before its embeddings"
            state = _state(seen, token, media, seq.request.salt)
            self._write(row.block_table, position, (token, media, state))
        return state

    def _run_tree(self, seq: Sequence, row: Row) -> list[int]:
        """Every branch from its own slots; then down the tree while what is drawn was proposed, and slots moved."""
        states = [self._known(seq, row, row.num_known)]
        start, tokens, table = row.start + row.root, row.tokens[row.root :], row.block_table
        before = [self._slot(table, past) for past in range(start)]
        branches: list[list[int]] = [[0]]
        for at, (token, parent) in enumerate(zip(tokens[1:], row.parents[1:]), 1):
            branches.append([*branches[parent], at])
            seen = before + [self._slot(table, start + past) for past in branches[at][:-1]]
            states.append(_state(seen, token, b"", seq.request.salt))
            self._write(table, start + at, (token, b"", states[at]))
        drawn: list[int] = []
        at = 0
        while True:
            drawn.append(draw(states[at], seq.request.seed, seq.index, start + len(drawn) + 1))
            following = [child for child, parent in enumerate(row.parents) if parent == at]
            accepted = [child for child in following if tokens[child] == drawn[-1]]
            if not accepted:
                break
            at = accepted[0]
        for place, kept in enumerate([self._slot(table, start + past) for past in branches[at]]):
            self._write(table, start + place, kept)
        for place in range(len(branches[at]), len(tokens)):  # what is left of the others must not be read
            self._write(table, start + place, None)
        return drawn

    def _write(self, table: list[int], position: int, slot: tuple[int, bytes, bytes] | None) -> None:
        self.cache[table[position // self.block_size]][position % self.block_size] = slot

    def _slot(self, table: list[int], position: int) -> tuple[int, bytes, bytes]:
        slot = self.cache[table[position // self.block_size]][position % self.block_size]
        assert slot is not None, "attention read a slot that nobody wrote"
        return slot


def expected_tokens(request: Request, index: int, num_tokens: int) -> list[int]:
    """The answer a lone request gets, from its own content only."""
    slots: list[tuple[int, bytes, bytes]] = []
    tokens = list(request.prompt)
    while True:
        for position in range(len(slots), len(tokens)):
            media = _media_key(request, position)
            slots.append((tokens[position], media, _state(slots, tokens[position], media, request.salt)))
        if len(tokens) - len(request.prompt) == num_tokens:
            return tokens[len(request.prompt) :]
        tokens.append(draw(slots[-1][2], request.seed, index, len(tokens)))
