"""Held-out evaluation: exact match per task, facts right in descriptions, the blind baseline and chance.

Answers are greedy: a turn is right when every answer token is the likeliest given the right ones before it, which is
what greedy decoding would write. Descriptions that are not exactly right are decoded and scored by facts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from kvkeye.models.keye.model import KeyeModel
from kvkeye.train.data import Batch, ChatEncoder, pack_single, questions_of
from kvkeye.train.losses import answer_logits
from kvkeye.train.questions import TASKS, Turn, score
from kvkeye.train.scenes import COLORS, SHAPES, Scene, Split

_log = logging.getLogger("kvkeye.train")
_MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class TaskScore:
    """Result of one task. `accuracy` is exact match, for descriptions the share of facts; `blind` is the same with
    grey pictures; `chance` is what the most frequent answer to such questions would score."""

    task: str
    split: str
    questions: int
    accuracy: float
    exact: float
    blind: float | None
    chance: float


@torch.no_grad()
def evaluate(
    model: KeyeModel,
    encoder: ChatEncoder,
    split: Split = "held_out",
    count: int = 500,
    tasks: Sequence[str] = TASKS,
    blind: bool = False,
    seed: int = 1,
    batch_size: int = 25,
) -> list[TaskScore]:
    """Scores `count` single questions per task on scenes that training never sees."""
    scores = []
    for task in tasks:
        items = questions_of(task, count, split, seed)
        got = _score_all(model, encoder, items, batch_size, decode=True)
        unseen = _score_all(model, encoder, items, batch_size, decode=False, blind=True) if blind else None
        scores.append(TaskScore(
            task, split, count, sum(got) / count, sum(s == 1.0 for s in got) / count,
            None if unseen is None else sum(unseen) / count, chance([turn for _, turn in items]),
        ))  # fmt: skip
        _log.info("%s", asdict(scores[-1]))
    return scores


def chance(turns: Sequence[Turn]) -> float:
    """What the most frequent answer scores, taken apart for questions that name a colour or shape and those that do
    not ("How many stars are there?" is mostly answered by 0 or 1, "How many objects are there?" is not)."""
    answers: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for turn in turns:
        answers[any(name in turn.question for name in (*COLORS, *SHAPES))][turn.answer] += 1
    return sum(max(counts.values()) for counts in answers.values() if counts) / len(turns)


def _score_all(
    model: KeyeModel,
    encoder: ChatEncoder,
    items: list[tuple[Scene, Turn]],
    size: int,
    decode: bool,
    blind: bool = False,
) -> list[float]:
    scores: list[float] = []
    for begin in range(0, len(items), size):
        part = items[begin : begin + size]
        data = pack_single(part, encoder, blind)
        exact = exact_turns(answer_logits(model, data)[0], data)
        for item, right in zip(part, exact):
            if right or not decode or item[1].task != "describe":
                scores.append(float(right))
            else:
                scores.append(score(item[1], greedy(model, encoder, item)))
    return scores


@torch.no_grad()
def exact_turns(logits: torch.Tensor, data: Batch) -> list[bool]:
    """For each turn of the batch, whether all of its answer tokens are the likeliest."""
    misses = torch.zeros(len(data.turns)).index_add_(0, data.turn_of, (logits.argmax(1) != data.targets).float())
    return [m == 0 for m in misses.tolist()]


@torch.no_grad()
def greedy(model: KeyeModel, encoder: ChatEncoder, item: tuple[Scene, Turn]) -> str:
    """The greedy answer to one question, by running the whole prefix for every token."""
    scene, turn = item
    written: list[int] = []
    while len(written) < _MAX_NEW_TOKENS:
        data = pack_single([(scene, turn)], encoder, answers=[written])
        token = int(answer_logits(model, data)[0][-1].argmax())
        if token == encoder.end:
            break
        written.append(token)
    return encoder.decode(written)


def table(scores: Sequence[TaskScore]) -> str:
    """The scores as a Markdown table."""
    lines = ["| task | set | questions | accuracy | exact | blind | chance |", "|---|---|---|---|---|---|---|"]
    for s in scores:
        blind = "" if s.blind is None else f"{100 * s.blind:.1f}"
        lines.append(
            f"| {s.task} | {s.split} | {s.questions} | {100 * s.accuracy:.1f} | {100 * s.exact:.1f} | {blind} | "
            f"{100 * s.chance:.1f} |"
        )
    return "\n".join(lines)
