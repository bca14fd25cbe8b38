"""Lossless verification: the tokens of plain sampling, or its distribution where proposals were drawn."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import _library
from kvkeye.testing.case import Sample
from kvkeye.testing.cases.speculative import verify_call

BACKENDS = [
    "eager",
    pytest.param(
        "cpp",
        marks=pytest.mark.skipif(
            _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
        ),
    ),
]
CHAIN = [-1, 0, 1]
TREE = [-1, 0, 0, 1, 2, 1]


def random_tree(rng: random.Random, rows: int, width: int) -> list[int]:
    parents = [-1]
    for row in range(1, rows):
        free = [r for r in range(row) if parents.count(r) < width]
        parents.append(rng.choice(free[-3:]))
    return parents


def children(tree: list[int], row: int) -> list[int]:
    return [child for child, parent in enumerate(tree) if parent == row]


def emitted(result: tuple[Tensor, Tensor, Tensor], bounds: list[int]) -> list[tuple[list[int], list[int]]]:
    """Per tree: tokens and rows, the rest being -1."""
    tokens, rows, counts = (part.tolist() for part in result)
    found = []
    for first, end, count in zip(bounds, bounds[1:], counts, strict=False):
        assert tokens[first + count : end] == rows[first + count : end] == [-1] * (end - first - count)
        found.append((tokens[first : first + count], rows[first : first + count]))
    return found


def drawn_one_by_one(args: tuple[Any, ...], tree: list[int], first: int, b: int) -> tuple[list[int], list[int]]:
    """The same by `sample`, a token at a time, following the tree."""
    logits, tokens = args[0], args[1].tolist()
    settings, (history, bounds, num_prompt, seeds, positions, index) = args[5:12], args[12:18]
    past = history[bounds[b] : bounds[b + 1]].tolist()
    found: list[int] = []
    rows: list[int] = []
    row = 0
    while True:
        seen = torch.tensor(past + found, dtype=torch.int32)
        token = int(
            ops.sample(
                logits[first + row][None], *(value[b : b + 1] for value in settings), seen,
                torch.tensor([0, len(seen)], dtype=torch.int32), num_prompt[b : b + 1], seeds[b : b + 1],
                positions[b : b + 1] + len(found), index[b : b + 1], None,
            )
        )  # fmt: skip
        found.append(token)
        rows.append(first + row)
        following = [child for child in children(tree, row) if tokens[first + child] == token]
        if not following:
            return found, rows
        row = following[0]


SETTINGS: list[dict[str, float]] = [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.5, "repetition": 1.4, "presence": 0.4, "frequency": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", SETTINGS)
def test_tokens_are_those_of_plain_sampling(backend: str, given: dict[str, float]) -> None:
    rng = random.Random(5)
    trees = tuple(random_tree(rng, rng.choice([1, 2, 5, 9, 64]), rng.randint(1, 4)) for _ in range(12))
    args = verify_call(Sample(torch.float32), torch.randn(sum(map(len, trees)), 40) * 3, trees, **given)
    with ops.use_backends(backend):
        found = emitted(ops.verify_draft(*args), args[3].tolist())
        for b, tree in enumerate(trees):
            assert found[b] == drawn_one_by_one(args, tree, int(args[3][b]), b), b
    assert max(len(tokens) for tokens, _ in found) > 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_rejected_all_accepted_none_proposed(backend: str) -> None:
    logits = torch.full((64 + 4 + 1, 30), 0.0)
    best = torch.arange(69) % 30
    logits[torch.arange(69), best] = 5.0
    chain = [*range(-1, 63)]
    args = list(verify_call(Sample(torch.float32), logits, (chain, [-1, 0, 0, 1], [-1]), temperature=0.0))
    args[1] = torch.cat([torch.tensor([0]), best[:63], torch.tensor([0, 7, 8, 9]), torch.tensor([0])])
    with ops.use_backends(backend):
        whole, rejected, alone = emitted(ops.verify_draft(*args), args[3].tolist())
    assert whole == (best[:64].tolist(), list(range(64)))  # 63 accepted and the bonus token
    assert rejected == ([int(best[64])], [64])
    assert alone == ([int(best[68])], [68])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("probable", [False, True])
def test_a_tree_depends_on_its_own_rows_only(backend: str, probable: bool) -> None:
    """Also when another one holds NaN: that one ends, with -1 where plain decoding would end."""
    trees = (CHAIN, TREE, [-1], TREE, CHAIN)
    logits = torch.randn(sum(map(len, trees)), 31) * 2
    args = list(verify_call(Sample(torch.float32), logits, trees, probable, temperature=0.4))
    bounds = args[3].tolist()
    with ops.use_backends(backend):
        together = emitted(ops.verify_draft(*args), bounds)
        broken = logits.clone()
        broken[bounds[1], 3] = torch.nan
        hurt = emitted(ops.verify_draft(broken, *args[1:]), bounds)
        assert hurt[1] == ([-1], [bounds[1]])
        assert hurt[:1] + hurt[2:] == together[:1] + together[2:]
        for b, tree in enumerate(trees):
            own = slice(bounds[b], bounds[b + 1])
            past = args[13].tolist()
            alone = (
                logits[own], args[1][own], args[2][own], torch.tensor([0, len(tree)], dtype=torch.int32),
                args[4][own] if probable else None, *(value[b : b + 1] for value in args[5:12]),
                args[12][past[b] : past[b + 1]], torch.tensor([0, past[b + 1] - past[b]], dtype=torch.int32),
                *(value[b : b + 1] for value in args[14:18]), None,
            )  # fmt: skip
            ((tokens, rows),) = emitted(ops.verify_draft(*alone), [0, len(tree)])
            assert (tokens, [row + bounds[b] for row in rows]) == together[b]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_behind_an_accepted_token(backend: str) -> None:
    logits = torch.zeros(3, 9)
    logits[0, 4] = logits[2, 1] = 50.0
    logits[1, 0] = torch.inf
    args = list(verify_call(Sample(torch.float32), logits, (CHAIN,), temperature=0.0))
    args[1] = torch.tensor([0, 4, 0])
    with ops.use_backends(backend):
        assert emitted(ops.verify_draft(*args), [0, 3]) == [([4, -1], [0, 1])]


def joint_counts(tree: list[int], count: int, p: Tensor, q: Tensor, probable: bool, seed: int) -> Tensor:
    """How often each triple of tokens follows token 0 of a chain with transitions p, drafted by q. [V, V, V]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, rows = p.shape[0], len(tree)
    tokens = torch.zeros(count, rows, dtype=torch.int64)
    for row in range(rows):
        offered = children(tree, row)
        if offered:  # without replacement, in order
            drawn = torch.multinomial(q[tokens[:, row]], len(offered), generator=generator)
            tokens[:, offered] = drawn if probable else torch.arange(len(offered)).expand(count, -1)
    flat = tokens.flatten()
    one, zero = torch.ones(count), torch.zeros(count)
    none = torch.zeros(count, dtype=torch.int32)
    drawn, _, counts = ops.verify_draft(
        p[flat].log().float(), flat, torch.tensor(tree, dtype=torch.int32).repeat(count),
        torch.arange(0, count * rows + 1, rows, dtype=torch.int32), q[flat].float() if probable else None,
        one, none, one, zero, one, zero, zero, none[:0], torch.zeros(count + 1, dtype=torch.int32), none,
        torch.arange(count) + seed * count, torch.full((count,), 7), none.long(), None,
    )  # fmt: skip
    drawn = drawn.view(count, rows)[:, :3].clone()
    for place in (1, 2):  # what was not reached is drawn as the next step would
        missing = counts <= place
        drawn[missing, place] = torch.multinomial(p[drawn[missing, place - 1]], 1, generator=generator)[:, 0]
    assert int(drawn.min()) >= 0 and int(drawn.max()) < vocabulary
    index = (drawn[:, 0] * vocabulary + drawn[:, 1]) * vocabulary + drawn[:, 2]
    return torch.bincount(index, minlength=vocabulary**3).double()


@pytest.mark.skipif(_library.native("cpp").path is None, reason="no C++ library: the reference needs an hour for this")
@pytest.mark.parametrize("probable", [True, False], ids=["drawn", "fixed"])
@pytest.mark.parametrize("tree", [CHAIN, TREE], ids=["chain", "tree"])
def test_the_distribution_of_three_tokens(tree: list[int], probable: bool) -> None:
    """Chi-square at 10^6 draws and the 1e-6 level, drafts far from the target."""
    generator = torch.Generator().manual_seed(2)
    p, q = (torch.rand(4, 4, generator=generator, dtype=torch.float64) ** 2 + 0.02 for _ in range(2))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    with ops.use_backends("cpp"):
        observed = sum(joint_counts(tree, 250_000, p, q, probable, seed) for seed in range(4))
    expected = 1e6 * (p[0][:, None, None] * p[:, :, None] * p[None]).flatten()
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 128.6  # quantile 1 - 1e-6 with 63 degrees of freedom


REFUSALS: list[tuple[int, Tensor, str]] = [
    (1, torch.tensor([0, 30, 2, 0, 1]), "draft_tokens[1] = 30; expected a token id from 0 to 29"),
    (1, torch.tensor([0, 3, -1, 0, 1]), "draft_tokens[2] = -1; expected a token id"),
    (2, torch.tensor([0, 0, 1, -1, 0]).int(), "tree_parents[0] = 0; expected -1, the root of tree 0"),
    (2, torch.tensor([-1, 0, 2, -1, 0]).int(), "tree_parents[2] = 2; expected an earlier row of tree 0, 0 to 1"),
    (2, torch.tensor([-1, 0, 1, -1, -1]).int(), "tree_parents[4] = -1; expected an earlier row of tree 1, 0 to 0"),
    (3, torch.tensor([0, 3, 4]).int(), "cu_rows runs from 0 to 4; expected 0 to 5"),
    (3, torch.tensor([0, 6, 5]).int(), "cu_rows[1] = 6 and [2] = 5; expected ascending values"),
]


@pytest.mark.skipif(_library.native("cpp").path is None, reason="no C++ library")
@pytest.mark.parametrize(("place", "value", "message"), REFUSALS)
def test_refusals(place: int, value: Tensor, message: str) -> None:
    args = list(verify_call(Sample(torch.float32), torch.randn(5, 30), (CHAIN, [-1, 0])))
    args[place] = value
    with pytest.raises(RuntimeError) as error:
        torch.ops.kvkeye_cpu.verify_draft(*args)
    assert message in str(error.value)


@pytest.mark.skipif(_library.native("cpp").path is None, reason="no C++ library")
def test_a_tree_of_more_than_64_rows_is_refused() -> None:
    args = verify_call(Sample(torch.float32), torch.randn(65, 30), ([*range(-1, 64)],))
    with pytest.raises(RuntimeError, match="tree 0 has 65 rows; at most 64"):
        torch.ops.kvkeye_cpu.verify_draft(*args)
