"""How many proposals are worth checking: from how often such proposals were right, and what a longer step costs.

Decides only how fast an answer comes, never what it says.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from kvkeye.engine.draft import Draft, depths_of

# Chance of a proposal before any was checked, by class of evidence: 0 is a drafter without one, 1 to 4 tokens that
# matched, 5 six and more, 6 twelve and more.
_PRIORS = (0.6, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85)
_RATE = 0.15  # weight of the newest outcome
_GAIN = 1.02  # what speculation must promise at least: the estimates are noisy
_LONGEST_PAUSE = 16  # steps in which a row that had no luck does not even ask its drafter
_PROBE = 4  # every so many times that nothing pays, one proposal is checked all the same


def evidence_class(evidence: int) -> int:
    """Matches of similar length share their estimates."""
    return min(evidence, 4) if evidence < 6 else 5 if evidence < 12 else 6


class StepCost:
    """Time of a decoding step as a line over its tokens, from the newest steps."""

    def __init__(self, slope: float = 0.03) -> None:
        self._prior = slope  # of one token, relative to a step of one
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        if self._weight > 8:
            seconds = min(seconds, 3 * self._at(num_tokens))  # a step that was interrupted says nothing
        decay = 0.99
        self._weight = decay * self._weight + 1
        self._x = decay * self._x + num_tokens
        self._y = decay * self._y + seconds
        self._xx = decay * self._xx + num_tokens * num_tokens
        self._xy = decay * self._xy + num_tokens * seconds

    def _line(self) -> tuple[float, float]:
        """(seconds of an empty step, seconds per token)."""
        if self._weight < 1:
            return 1.0 - self._prior, self._prior
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        # Few steps of another length: the prior slope, as if of some steps, holds the line.
        prior = self._prior * mean_y
        covariance = self._xy / self._weight - mean_x * mean_y
        slope = (covariance + 0.05 * prior) / (spread + 0.05)
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y - slope * mean_x, slope

    def _at(self, num_tokens: int) -> float:
        base, slope = self._line()
        return base + slope * num_tokens

    def slope(self, num_tokens: int) -> float:
        """Time of one token more, over that of a step of `num_tokens`."""
        base, slope = self._line()
        return slope / max(base + slope * num_tokens, 1e-12)


@dataclass
class RowTrust:
    """What one row has learned. `num_misses` in a row; `wait` steps until it asks again; `num_idle` drafts unused."""

    chances: dict[int, float] = field(default_factory=dict)
    num_misses: int = 0
    wait: int = 0
    num_idle: int = 0

    def miss(self) -> None:
        self.num_misses += 1
        if self.num_misses > 1:
            self.wait = min(2 ** (self.num_misses - 2), _LONGEST_PAUSE)


class DraftLength:
    """Shortens drafts to what pays. Chances are learned per row, from what all rows have learned."""

    def __init__(self) -> None:
        self.cost = StepCost()
        self._chances: dict[int, float] = {}
        self._rows: dict[int, RowTrust] = {}

    def chance(self, seq_id: int, evidence: int) -> float:
        """That a proposal is drawn, given that its parent was and its share of the counts is 1."""
        key = evidence_class(evidence)
        row = self._rows.get(seq_id)
        return (row.chances if row else {}).get(key, self._chances.get(key, _PRIORS[key]))

    def is_waiting(self, seq_id: int) -> bool:
        """Whether the row leaves this step out."""
        row = self._rows.get(seq_id)
        if row is None or row.wait == 0:
            return False
        row.wait -= 1
        return True

    def choose(self, seq_id: int, draft: Draft, num_rows: int) -> Draft:
        """The part of a draft to check in a step of `num_rows` rows; it may be empty."""
        row = self._rows.setdefault(seq_id, RowTrust())
        length = self._best_length(draft, self.chance(seq_id, draft.evidence), num_rows)
        if length == 0:
            row.num_idle += 1
            if row.num_idle % _PROBE:
                row.miss()
                return Draft()
            length = 1  # to see whether the text has changed
        return draft.trimmed(length, length)

    def _best_length(self, draft: Draft, chance: float, num_rows: int) -> int:
        depths = depths_of([-1, *draft.parents])[1:]
        slope = self.cost.slope(num_rows)
        best, best_gain, gained = 0, _GAIN, 0.0
        for count, (depth, score) in enumerate(zip(depths, draft.scores), 1):
            gained += score * chance**depth
            gain = (1 + gained / num_rows) / (1 + slope * count)
            if gain > best_gain:
                best, best_gain = count, gain
            elif count == depth and score * chance**depth / num_rows < slope * gain:
                break  # along a chain the next one is worth even less
        return best

    def observe(self, seq_id: int, evidence: int, outcomes: SequenceOf[bool]) -> None:
        """Whether each checked proposal along the accepted branch was drawn, the first that was not being the last."""
        key = evidence_class(evidence)
        row = self._rows.setdefault(seq_id, RowTrust())
        for right in outcomes:
            row.chances[key] = _moved(self.chance(seq_id, evidence), right, _RATE)
            self._chances[key] = _moved(self._chances.get(key, _PRIORS[key]), right, _RATE / 3)
        if outcomes and not outcomes[0]:
            row.miss()
        elif outcomes:
            row.num_misses = row.wait = 0

    def forget(self, seq_id: int) -> None:
        self._rows.pop(seq_id, None)


def _moved(estimate: float, right: bool, rate: float) -> float:
    return estimate + rate * (float(right) - estimate)
