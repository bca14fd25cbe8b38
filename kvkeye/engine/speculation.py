"""Speculative decoding of one engine: asks a drafter, keeps what pays, counts what came of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from kvkeye.engine.config import EngineConfig, SpeculationConfig
from kvkeye.engine.draft import Draft, Drafter, depths_of
from kvkeye.engine.draft_length import DraftLength
from kvkeye.engine.drafters import NgramDrafter
from kvkeye.engine.outputs import SpeculationMetrics
from kvkeye.engine.request import Sequence
from kvkeye.engine.step import Row, Step
from kvkeye.errors import ConfigError


@dataclass
class Tally:
    """Counts of one request or one engine."""

    num_steps: int = 0  # in which a row decoded, or its prompt came with proposals
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    checked: list[int] = field(default_factory=list)  # drafts that reached this depth
    accepted: list[int] = field(default_factory=list)  # and whose proposal there was drawn
    seconds: float = 0.0  # of decoding steps, shared by their rows
    plain_seconds: float = 0.0  # what one token at a time would have taken

    def add(self, depth: int, num_tokens: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_tokens
        self.num_accepted_tokens += num_accepted
        for counts in (self.checked, self.accepted):
            counts += [0] * (depth - len(counts))
        for place in range(min(depth, num_accepted + 1)):
            self.checked[place] += 1
            self.accepted[place] += place < num_accepted

    def metrics(self) -> SpeculationMetrics:
        return SpeculationMetrics(
            num_decode_steps=self.num_steps,
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            acceptance_by_position=[n / max(1, total) for n, total in zip(self.accepted, self.checked)],
            tokens_per_step=1 + self.num_accepted_tokens / self.num_steps if self.num_steps else None,
            saved_ms=1e3 * (self.plain_seconds - self.seconds),
        )


class Speculation:
    """What the scheduler asks for proposals (`propose`), and the engine tells the outcome (`observe`).

    num_tokens  proposals per row and step at most
    adaptive    False checks everything that the drafter proposes
    """

    def __init__(self, drafter: Drafter, num_tokens: int, adaptive: bool = True) -> None:
        self.drafter = drafter
        self.num_tokens = num_tokens
        self.adaptive = adaptive
        self.length = DraftLength()
        self.total = Tally()
        self._by_request: defaultdict[str, Tally] = defaultdict(Tally)
        self._evidence: dict[int, int] = {}  # of the drafts of the current step

    def propose(self, sequences: SequenceOf[Sequence], budget: int) -> dict[int, Draft]:
        """Drafts of rows that get their next token in the coming step; it may be asked several times before one."""
        num_rows = len(sequences)
        if self.adaptive:
            sequences = [seq for seq in sequences if not self.length.is_waiting(seq.seq_id)]
        if not sequences:
            return {}
        limits = {seq.seq_id: min(self.num_tokens, seq.max_draft_depth) for seq in sequences}
        drafts = self.drafter.propose(sequences, limits)
        found = {}
        for seq_id, draft in drafts.items():
            kept = self.length.choose(seq_id, draft, num_rows) if self.adaptive else draft
            kept = kept.trimmed(budget, budget)
            if len(kept):
                found[seq_id] = kept
                budget -= len(kept)
        self._evidence |= {seq_id: draft.evidence for seq_id, draft in found.items()}
        return found

    def forget(self, sequence: Sequence) -> None:
        self.drafter.forget(sequence)
        self.length.forget(sequence.seq_id)

    def observe(self, step: Step, sequences: dict[int, Sequence], num_drawn: dict[int, int], seconds: float) -> None:
        """A step has taken `seconds`, and `num_drawn[row id]` tokens came of its rows."""
        decoding = [row for row in step.rows if _is_decoding(row, sequences[row.seq_id])]
        if len(decoding) == len(step.rows):
            self.length.cost.observe(step.num_tokens, seconds)
        self._count_time(step, decoding, sequences, num_drawn, seconds)
        for row in step.rows:
            if row.parents:
                self._count_drawn(row, sequences[row.seq_id], num_drawn.get(row.seq_id, 0))
        self._evidence = {}

    def _tallies(self, seq: Sequence) -> tuple[Tally, Tally]:
        return self.total, self._by_request[seq.request.request_id]

    def _count_time(
        self,
        step: Step,
        decoding: list[Row],
        sequences: dict[int, Sequence],
        num_drawn: dict[int, int],
        seconds: float,
    ) -> None:
        # A token alone would have cost a step like this one without its proposals.
        drafted = sum(len(row.parents) - 1 for row in decoding if row.parents)
        plain = seconds / (1 + drafted * self.length.cost.slope(step.num_tokens - drafted)) if drafted else seconds
        for row in decoding:
            drawn = num_drawn.get(row.seq_id, 0)
            for tally in self._tallies(sequences[row.seq_id]):
                tally.num_steps += 1
                tally.seconds += seconds / len(decoding)
                tally.plain_seconds += max(1, drawn) * plain / len(decoding)

    def _count_drawn(self, row: Row, seq: Sequence, drawn: int) -> None:
        """`drawn` tokens came of the row's proposals; 0: no valid probabilities."""
        depth = max(depths_of(row.parents))
        for tally in self._tallies(seq):
            tally.num_steps += not _is_decoding(row, seq)
            if drawn:
                tally.add(depth, len(row.parents) - 1, drawn - 1)
        if drawn:
            outcomes = [True] * (drawn - 1) + [False] * (drawn - 1 < depth)
            self.length.observe(row.seq_id, self._evidence.get(row.seq_id, 0), outcomes)

    def metrics(self, request_id: str) -> SpeculationMetrics | None:
        tally = self._by_request.get(request_id)
        return None if tally is None else tally.metrics()

    def forget_request(self, request_id: str) -> None:
        self._by_request.pop(request_id, None)


def speculation_of(config: EngineConfig, drafter: Drafter | None, backends: str) -> Speculation | None:
    """What a configuration asks for; None is plain decoding."""
    wanted = config.speculation
    if wanted == "auto":
        # Elsewhere the bits of a token may depend on the tokens beside it, proposals among them.
        wanted = SpeculationConfig() if backends == "cpp" else None
    if not isinstance(wanted, SpeculationConfig):
        return None
    if wanted.model is not None and drafter is None:
        raise ConfigError(f"SpeculationConfig.method: {wanted.method} needs the model itself. Use Engine.from_config.")
    shared = wanted.suffix_cached_tokens if wanted.method == "suffix" else 0
    drafter = drafter or NgramDrafter(wanted.prompt_lookup_min, wanted.prompt_lookup_max, wanted.tree_width, shared)
    return Speculation(drafter, wanted.num_speculative_tokens, wanted.adaptive)


def _is_decoding(row: Row, seq: Sequence) -> bool:
    """Whether the row computes nothing but its last token and proposals after it."""
    return seq.num_generated > 0 and row.num_samples == 1 and row.num_known == 1
