"""Pure-Python twin of `kvkeye._host.NgramIndex` (csrc/host/ngram_index.cpp): same proposals, same errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_MATCH = 32  # longer matches count as this long
SEPARATOR = -1  # ends a text: nothing matches or is proposed across it

Proposal = tuple[list[int], list[int], list[float], int]


@dataclass(eq=False)
class _Node:
    token: int
    order: int
    weight: float = 0.0
    children: list[_Node] = field(default_factory=list)

    @property
    def rank(self) -> tuple[float, int]:
        """Heavier first; older nodes, which come from newer places, on ties."""
        return (-self.weight, self.order)


class NgramIndex:
    """Where the last tokens of a text stood before, and what followed.

    Appending a token costs max_length hash entries; proposing looks at max_candidates places. Of the last tokens, as
    many as stood anywhere before are looked up, between min_length and max_length of them; the newest places are
    taken, and what followed each is weighed by the length of its match.
    """

    def __init__(self, min_length: int, max_length: int, max_candidates: int) -> None:
        if not 1 <= min_length <= max_length <= MAX_MATCH:
            raise ValueError(
                f"NgramIndex: lengths from {min_length} to {max_length}; expected 1 <= min_length <= max_length <= "
                f"{MAX_MATCH}"
            )
        if max_candidates < 1:
            raise ValueError(f"NgramIndex: max_candidates is {max_candidates}; expected at least 1")
        self._lengths = min_length, max_length
        self._max_candidates = max_candidates
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}  # one past each occurrence of an n-gram

    @property
    def size(self) -> int:
        return len(self._text)

    def append(self, tokens: list[int]) -> None:
        """Adds tokens to the text; -1 ends one text and starts another. ValueError for anything below."""
        for token in tokens:
            if token < SEPARATOR:
                raise ValueError(f"NgramIndex.append: token {token}; expected at least -1")
        shortest, longest = self._lengths
        for token in tokens:
            self._text.append(token)
            for n in range(shortest, min(longest, len(self._text)) + 1):
                gram = tuple(self._text[-n:])
                if SEPARATOR not in gram:
                    self._ends.setdefault(gram, []).append(len(self._text))

    def keep_last(self, count: int) -> None:
        """Forgets all but the last `count` tokens; costs as much as appending these."""
        if count < 0:
            raise ValueError(f"NgramIndex.keep_last: count is {count}; expected at least 0")
        kept = self._text[max(0, self.size - count) :]
        self._text, self._ends = [], {}
        self.append(kept)

    def propose(self, num_tokens: int, width: int) -> Proposal:
        """What may follow the text itself.

        Returns up to `num_tokens` tokens; the parent of each, 0 for the text's end and i + 1 for proposal i; how likely
        each is by the counts; and how many tokens matched. Parents come first, the likeliest branch before the
        others; at most `width` proposals have the same parent.
        """
        return self._build(self._find(self._text[-MAX_MATCH:]), True, num_tokens, width)

    def propose_after(self, tail: list[int], num_tokens: int, width: int) -> Proposal:
        """What may follow another text that ends with `tail`."""
        return self._build(self._find(tail), False, num_tokens, width)

    def _match_length(self, end: int, tail: list[int]) -> int:
        length = 0
        while length < min(MAX_MATCH, end, len(tail)):
            token = self._text[end - 1 - length]
            if token == SEPARATOR or token != tail[-1 - length]:
                break
            length += 1
        return length

    def _find(self, tail: list[int]) -> list[tuple[int, int]]:
        """(one past the end, length of the match) of the newest places."""
        shortest, longest = self._lengths
        for n in range(min(longest, len(tail)), shortest - 1, -1):
            ends = reversed(self._ends.get(tuple(tail[len(tail) - n :]), []))
            usable = [end for end in ends if end < self.size and self._text[end] != SEPARATOR]
            if usable:
                return [(end, self._match_length(end, tail)) for end in usable[: self._max_candidates]]
        return []

    def _continuation(self, end: int, own: bool, count: int) -> Iterator[int]:
        copied: list[int] = []
        for at in range(end, end + count):
            if at >= self.size and not own:
                return
            # Behind its own end a text goes on with what has just been copied.
            token = self._text[at] if at < self.size else copied[at - self.size]
            if token == SEPARATOR:
                return
            copied.append(token)
            yield token

    def _build(self, places: list[tuple[int, int]], own: bool, num_tokens: int, width: int) -> Proposal:
        longest = max((length for _, length in places), default=0)
        root, total, count = _Node(-1, 0), 0.0, 1
        for end, length in places:
            weight = 4.0 ** (length - longest)  # a token more of context counts four times as much
            total += weight
            node = root
            for token in self._continuation(end, own, num_tokens):
                child = next((child for child in node.children if child.token == token), None)
                if child is None:
                    child = _Node(token, count)
                    node.children.append(child)
                    count += 1
                node = child
                node.weight += weight
        chosen = _choose(root, num_tokens, width)
        out: Proposal = ([], [], [], longest)
        _write(root, 0, chosen, total, out)
        return out


def _choose(root: _Node, count: int, width: int) -> set[int]:
    """Orders of the `count` heaviest nodes, at most `width` below one parent."""
    chosen: set[int] = set()
    open_nodes = sorted(root.children, key=lambda node: node.rank)[:width]
    while len(chosen) < count and open_nodes:
        node = min(open_nodes, key=lambda node: node.rank)
        open_nodes.remove(node)
        chosen.add(node.order)
        open_nodes += sorted(node.children, key=lambda node: node.rank)[:width]
    return chosen


def _write(node: _Node, row: int, chosen: set[int], total: float, out: Proposal) -> None:
    for child in sorted(node.children, key=lambda node: node.rank):
        if child.order in chosen:
            out[0].append(child.token)
            out[1].append(row)
            out[2].append(child.weight / total)
            _write(child, len(out[0]), chosen, total, out)
