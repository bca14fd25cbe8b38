"""A step's plan: which rows compute which tokens over which blocks, and which media are encoded. Plain numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kvkeye.engine.draft import MAX_TREE_ROWS, Draft, branch_length
from kvkeye.engine.request import MediaSpan, Sequence


@dataclass(frozen=True)
class Row:
    """Compute `tokens` from position `start` of row `seq_id`; then draw `num_samples` tokens, or none.

    With proposals, `tokens` ends with the row's last token and these, and `parents` is their tree, -1 for that token;
    they lie in consecutive slots whatever their place in the tree. One draw then gives several tokens.
    """

    seq_id: int
    start: int
    tokens: list[int]
    block_table: list[int]
    num_samples: int
    parents: list[int] = field(default_factory=list)

    @property
    def num_known(self) -> int:
        """Tokens before the proposals."""
        return len(self.tokens) - max(0, len(self.parents) - 1)

    @property
    def root(self) -> int:
        """Where the tree begins in `tokens`; their number without proposals."""
        return len(self.tokens) - len(self.parents)

    @property
    def is_branched(self) -> bool:
        return branch_length(self.parents) < len(self.parents)

    def first_branch(self) -> Row:
        """Without the proposals outside the first branch."""
        if not self.parents:
            return self
        length = branch_length(self.parents)
        return replace(self, tokens=self.tokens[: self.root + length], parents=self.parents[:length])


@dataclass(frozen=True)
class Encoding:
    """Compute the embeddings named `embeds`: media span number `index` of row `seq_id`'s request."""

    seq_id: int
    index: int
    embeds: bytes
    num_patches: int


@dataclass(frozen=True)
class Step:
    """One pass of the encoder, then one of the decoder. `block_copies` (source, target) come before its rows."""

    rows: list[Row] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.rows or self.encodings)

    @property
    def seq_ids(self) -> set[int]:
        """Of all rows that take part."""
        return {encoding.seq_id for encoding in self.encodings} | {row.seq_id for row in self.rows}

    def without(self, seqs: Iterable[Sequence]) -> Step:
        """The same step without the rows of these."""
        gone = {seq.seq_id for seq in seqs}
        return replace(self, rows=[row for row in self.rows if row.seq_id not in gone])

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass
class Plan:
    """A step while it is put together. `num_due` decoding rows are still to be placed."""

    budget: int
    encoder_budget: int
    drafts: dict[int, Draft] = field(default_factory=dict)
    num_due: int = 0
    rows: list[Row] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    planned: set[int] = field(default_factory=set)

    def encode(self, seq: Sequence, index: int, span: MediaSpan) -> bool:
        """False if the span does not fit any more. One that fits no budget goes alone."""
        if span.num_patches > self.encoder_budget and self.encodings:
            self.encoder_budget = 0
            return False
        self.encodings.append(Encoding(seq.seq_id, index, span.embeds, span.num_patches))
        self.encoder_budget = max(0, self.encoder_budget - span.num_patches)
        return True

    def add(self, seq: Sequence, num_tokens: int, draft: Draft | None, copies: list[tuple[int, int]]) -> None:
        tokens = seq.tokens[seq.num_computed : seq.num_computed + num_tokens]
        num_samples = seq.width if num_tokens == seq.num_remaining else 0
        parents = [-1, *draft.parents] if draft else []
        tokens += draft.tokens if draft else []
        self.rows.append(Row(seq.seq_id, seq.num_computed, tokens, list(seq.block_table), num_samples, parents))
        self.copies += copies
        self.planned.add(seq.seq_id)
        self.budget -= len(tokens)

    def finished(self) -> Step:
        rows = self.rows
        # A tree's mask has a bit per row: beside a longer chunk only branches without a mask can be verified.
        if any(len(row.tokens) > MAX_TREE_ROWS for row in rows):
            rows = [row.first_branch() for row in rows]
        return Step(rows, self.copies, self.encodings)
