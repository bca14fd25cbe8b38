"""The CUDA verify_draft without a GPU: the tokens of the CPU, those of `sample` to the bit, hostile trees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Sample, good
from kvkeye.testing.cases.speculative import verify_call
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant
from tests.native.test_cuda_sampling import NAMES, call_of

FILES = [harness.CUDA / "speculative.cu", harness.CUDA / "sampling_accept.h"]
TREES = ("draft_tokens", "tree_parents", "cu_rows", "draft_probs")
OUTPUTS = ("tokens", "from_rows", "counts")
CHAIN = list(range(-1, 63))
pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


def verify(arguments: tuple[Any, ...]) -> Call:
    logits, given, settings = arguments[0], dict(zip(TREES, arguments[1:5], strict=True)), arguments[5:]
    probable = given["draft_probs"] is not None
    trees = len(given["cu_rows"]) - 1
    draws = call_of((logits, *settings), padding=3)
    outputs = {"tokens": torch.full((len(logits),), -7), "from_rows": torch.full((len(logits),), -7)}
    buffers = {**draws.buffers, **outputs, "counts": torch.full((trees,), -7), **given}
    numbers = {**draws.numbers, "probable": int(probable), "trees": trees}
    return Call("verify_draft", numbers, {name: buffer for name, buffer in buffers.items() if buffer is not None})


def by_cpu(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    with ops.use_backends("cpp,eager"):
        found: tuple[Tensor, Tensor, Tensor] = ops.verify_draft(*arguments)
    return found


def check(program: Path, seed: int, table: dict[str, tuple[Any, ...]], folder: Path) -> list[dict[str, Tensor]]:
    """Asserts the CPU's tokens, rows and counts."""
    found = harness.run(program, seed, [verify(arguments) for arguments in table.values()], folder)
    for (name, arguments), outputs in zip(table.items(), found, strict=True):
        for output, expected in zip(OUTPUTS, by_cpu(arguments), strict=True):
            assert torch.equal(outputs[output], expected), f"{name}: {output}"
    return found


#: Rows of the case table, and what each alone reaches. Settings beyond these are `sample`'s, or in WIDE.
ROWS = {
    "plain": "draws by chance down five shapes of trees",
    "plain_probable": "offers accepted and rejected, and what they leave",
    "greedy_probable": "offers where all the mass is one token's",
    "penalties_greedy": "drawn tokens count as history in the rows below",
    "wide": "63 children of one row",
    "no_trees": "a launch without work",
    "empty_tree": "a tree without rows between two others",
    "broken_rows": "NaN and infinities end a walk",
    "mask": "a mask per row, one of which allows nothing",
    "mask_probable": "offers that the mask forbids",
}


def test_rows_of_the_case_table(asan: Path, tmp_path: Path) -> None:
    cases = {case.id: case.args for case in good("verify_draft", Sample(torch.float32))}
    check(asan, 1, {name: cases[name] for name in ROWS}, tmp_path / "calls")


#: Settings of a vocabulary of more tokens than a block can sort: cuts, and draws that penalties change.
WIDE: dict[str, dict[str, float]] = {
    "plain": {},
    "top_k": {"top_k": 20},
    "wide top_k": {"top_k": 1100},
    "top_p": {"top_p": 0.95},
    "both, min_p": {"top_k": 900, "top_p": 0.8, "min_p": 0.001},
    "penalties": {"repetition": 1.3, "presence": 0.5, "frequency": 0.2, "top_p": 0.9},
}


def wide(seed: int, *, probable: bool, dtype: torch.dtype = torch.float32, **settings: float) -> tuple[Any, ...]:
    sample = Sample(dtype, seed=seed)
    return verify_call(sample, sample(6, 1300, scale=2.0), ([-1, 0, 0, 1], [-1, 0]), probable, **settings)


def test_offers_beside_a_wide_nucleus(asan: Path, tmp_path: Path) -> None:
    table = {name: wide(seed, probable=True, **given) for seed, (name, given) in enumerate(WIDE.items())}
    found = check(asan, 2, table, tmp_path / "calls")
    assert torch.cat([outputs["counts"] for outputs in found]).max() > 1


def prefixes(arguments: tuple[Any, ...], outputs: dict[str, Tensor]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """For each drawn token: the arguments of `sample` that draw it alone, and the token."""
    settings = dict(zip(NAMES[1:], arguments[5:], strict=True))
    bounds, past = arguments[3].tolist(), settings["cu_history"].tolist()
    for b, count in enumerate(outputs["counts"].tolist()):
        drawn = outputs["tokens"][bounds[b] : bounds[b] + count]
        history = settings["history"][past[b] : past[b + 1]]
        for i, row in enumerate(outputs["from_rows"][bounds[b] : bounds[b] + count].tolist()):
            one = {name: value[b : b + 1] for name, value in settings.items() if value is not None}
            seen = torch.cat([history, drawn[:i].int()])
            one |= {"history": seen, "cu_history": torch.tensor([0, len(seen)], dtype=torch.int32), "mask": None}
            one["positions"] = one["positions"] + i
            yield (arguments[0][row : row + 1], *(one[name] for name in NAMES[1:])), int(drawn[i])


def test_tokens_are_those_of_sample(asan: Path, tmp_path: Path) -> None:
    """Proposals are what the CPU draws, so that the walk goes deep."""
    expected: list[int] = []
    singles: list[Call] = []
    for i, name in enumerate(("top_k", "top_p", "penalties")):
        arguments = list(wide(i, probable=False, dtype=torch.bfloat16, **WIDE[name]))
        for _ in range(2):
            tokens, rows, counts = by_cpu(tuple(arguments))
            for first, count in zip((0, 4), counts.tolist(), strict=True):
                row = int(rows[first + count - 1])
                for child in (arguments[2][first:] == row - first).nonzero()[:1] + first:
                    arguments[1][child] = tokens[first + count - 1]
        outputs = harness.run(asan, i, [verify(tuple(arguments))], tmp_path / str(i))[0]
        assert outputs["counts"].tolist() == [3, 2]
        for single, token in prefixes(tuple(arguments), outputs):
            singles.append(call_of(single))
            expected.append(token)
    found = harness.run(asan, 1, singles, tmp_path / "singles")
    assert [int(outputs["tokens"]) for outputs in found] == expected


def greedy_chain(rejected: int) -> tuple[Any, ...]:
    """64 rows whose proposals are the likeliest tokens, but for row `rejected`."""
    sample = Sample(torch.float32, seed=4)
    arguments = list(verify_call(sample, sample(64, 90, scale=3.0), (CHAIN,), temperature=0.0))
    best = arguments[0].argmax(1)
    arguments[1] = torch.cat([torch.tensor([0]), best[:-1]])
    if rejected < 64:
        arguments[1][rejected] = (best[rejected - 1] + 1) % 90
    return tuple(arguments)


def test_full_acceptance_and_a_first_token_that_is_rejected(asan: Path, tmp_path: Path) -> None:
    found = check(asan, 3, {str(n): greedy_chain(n) for n in (64, 1)}, tmp_path / "calls")
    assert [int(outputs["counts"]) for outputs in found] == [64, 1]


def race_calls() -> list[Call]:
    """Offers accepted and rejected, with and without penalties, deep rows, two trees."""
    sample = Sample(torch.float32, seed=5)
    small = sample(8, 700, scale=1.0)
    tree, chain = [-1, 0, 0, 0, 1], [-1, 0, 1]
    return [
        verify(verify_call(sample, small, (tree, chain), True)),
        verify(verify_call(sample, small, (tree, chain), True, repetition=1.2, presence=0.3, top_k=30, top_p=0.9)),
        verify(verify_call(sample, small, (tree, chain), frequency=0.4, temperature=0.5)),
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_no_races(seed: int, races: Path, tmp_path: Path) -> None:
    harness.check_races(races, seed, race_calls(), tmp_path / "calls")


@pytest.mark.parametrize("wait", [wait for path in FILES for wait in harness.waits(path)])
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    harness.check_wait(races, race_calls(), tmp_path, wait)


@pytest.mark.parametrize("plant", plants.SPECULATIVE, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    harness.check_plant(asan, race_calls()[:1], tmp_path, plant)


@pytest.mark.parametrize(
    "broken",
    [(2, 3, 3), (2, 0, 0), (2, 1, -1), (1, 3, 700), (1, 3, -1), (3, 1, 9), (3, 2, 7), (3, 0, 1)],
    ids=["parent of itself", "root with parent", "no parent", "token", "negative token", "bounds", "end", "begin"],
)
def test_hostile_trees_trap(broken: tuple[int, int, int], asan: Path, tmp_path: Path) -> None:
    argument, place, value = broken
    sample = Sample(torch.float32)
    arguments = list(verify_call(sample, sample(8, 700), ([-1, 0, 0, 0, 1], [-1, 0, 1])))
    arguments[argument][place] = value
    result = harness.execute(asan, 1, [verify(tuple(arguments))], tmp_path / "call")
    assert result.returncode == harness.FAULT and "reached __trap at speculative.cu:" in result.stderr


def test_a_tree_of_65_rows_traps(asan: Path, tmp_path: Path) -> None:
    sample = Sample(torch.float32)
    arguments = verify_call(sample, sample(65, 30), (list(range(-1, 64)),))
    result = harness.execute(asan, 1, [verify(arguments)], tmp_path / "call")
    assert result.returncode == harness.FAULT and "reached __trap at speculative.cu:" in result.stderr
