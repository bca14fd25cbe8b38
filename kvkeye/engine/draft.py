"""Proposed tokens as a tree, and what proposes them. Plain numbers; no tensors.

A tree hangs below a row's last token. Proposal i has parent 0, that token, or j + 1, proposal j, which comes before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from kvkeye.engine.request import Sequence

MAX_TREE_ROWS = 64  # the last token included


@dataclass(frozen=True)
class Draft:
    """Proposals after a row's last token, parents first, the likeliest branch before the others.

    scores    how likely each is to be reached and drawn, up to the trust in `evidence`
    evidence  what they rest on, comparable within one drafter: tokens that matched, or 0
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    evidence: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def trimmed(self, num_tokens: int, depth: int) -> Draft:
        """At most the first `num_tokens` proposals, none deeper than `depth`."""
        depths = depths_of([-1, *self.parents])[1:]
        kept = [i for i, own in enumerate(depths) if own <= depth][: max(0, num_tokens)]
        if len(kept) == len(self.tokens):
            return self
        place = {0: 0} | {i + 1: new + 1 for new, i in enumerate(kept)}
        return Draft(
            [self.tokens[i] for i in kept],
            [place[self.parents[i]] for i in kept],
            [self.scores[i] for i in kept],
            self.evidence,
        )


class Drafter(Protocol):
    """Anything that proposes. What it proposes cannot change an answer, only how fast it comes."""

    def propose(self, sequences: SequenceOf[Sequence], num_tokens: Mapping[int, int]) -> dict[int, Draft]:
        """Drafts by row id, each of at most `num_tokens[row id]` tokens. Rows may be left out."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The row has ended."""
        ...


def depths_of(parents: SequenceOf[int]) -> list[int]:
    """Of every row of a tree; parents[0] is -1."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def branch_length(parents: SequenceOf[int]) -> int:
    """Rows of the branch that starts a tree: each is the child of the one before it."""
    return next((row for row, parent in enumerate(parents) if parent != row - 1), len(parents))


def branch_masks(parents: SequenceOf[int]) -> list[int]:
    """Bit j of entry i: row i sees row j, itself or an ancestor. As signed 64-bit numbers."""
    masks: list[int] = []
    for row, parent in enumerate(parents):
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << row)
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]
