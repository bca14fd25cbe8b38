"""The CUDA paged_attention without a GPU: on the host, in shuffled orders, against float64, by bits and by mutants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Sample
from kvkeye.testing.compare import assert_close
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SOURCE = harness.CUDA / "paged_attention.cu"
pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


class Paged:
    """Sequences in a cache whose every slot outside of them is NaN. `rows` are the new tokens of each."""

    def __init__(
        self, context: Sequence[int], rows: Sequence[int], heads: tuple[int, int], block_size: int, dim: int,
        tree: Sequence[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        sample = Sample(torch.bfloat16, seed=seed)
        needed = [-(-length // block_size) for length in context]
        order = sample.permutation(sum(needed)).int()
        self.table = torch.full((len(context), max(*needed, 1)), -1, dtype=torch.int32)
        self.k, self.v = (torch.full((max(sum(needed), 1), heads[1], block_size, dim), torch.nan) for _ in "kv")
        for b, (count, length) in enumerate(zip(needed, context, strict=True)):
            self.table[b, :count] = order[sum(needed[:b]) : sum(needed[: b + 1])]
            position = torch.arange(length)
            block = self.table[b, position // block_size].long()
            for cache in (self.k, self.v):
                cache[block, :, position % block_size] = sample(length, heads[1], dim).float()
        self.k, self.v = self.k.bfloat16(), self.v.bfloat16()
        self.q = sample(sum(rows), heads[0], dim)
        self.bounds = sample.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], torch.int32)
        self.context = sample.tensor(list(context), torch.int32)
        self.tree = None if tree is None else sample.tensor(list(tree), torch.int64)

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = self.q.to(dtype), self.k.to(dtype), self.v.to(dtype)
        return q, k, v, self.table, self.bounds, self.context, self.tree, self.q.shape[2] ** -0.5

    def call(self, **numbers: int) -> Call:
        """`in_one_walk`: a block of threads takes all splits. `q_padding`: elements between the heads of q."""
        padding = numbers.pop("q_padding", 0)
        tokens, heads, dim = self.q.shape
        q = torch.full((tokens, heads, dim + padding), torch.nan, dtype=self.q.dtype)
        q[..., padding:] = self.q
        given = {
            "q_offset": padding, "q_token_stride": heads * (dim + padding), "q_head_stride": dim + padding,
            "tree": int(self.tree is not None), "tokens": tokens, "sequences": len(self.context), "q_heads": heads,
            "kv_heads": self.k.shape[1], "blocks": self.k.shape[0], "block_size": self.k.shape[2], "head_dim": dim,
            "max_blocks": self.table.shape[1], "scale_billionths": round(dim**-0.5 * 1e9),
            "in_one_walk": 0, "replay": 0, "fp8": 0,
        } | numbers  # fmt: skip
        buffers = {
            "q": q, "k_cache": self.k, "v_cache": self.v, "block_table": self.table, "cu_seqlens_q": self.bounds,
            "context_lens": self.context, "o": torch.full_like(self.q, torch.nan),
            "lse": torch.full((tokens, heads), torch.nan),
        }  # fmt: skip
        return Call("paged_attention", given, buffers if self.tree is None else buffers | {"tree_mask": self.tree})

    def suffix(self, count: int, drop: int = 0) -> Paged:
        """The one sequence's last `count` rows alone, without the `drop` newest tokens."""
        last = len(self.q) - drop
        alone = object.__new__(type(self))
        alone.__dict__ = dict(self.__dict__)
        alone.q, alone.context = self.q[last - count : last], self.context - drop
        alone.bounds = torch.tensor([0, count], dtype=torch.int32)
        return alone


#: Names say what each is for; in each, heads of one group share a tile of 16 or 32 rows.
BATCHES: dict[str, Paged] = {
    "decode": Paged([1, 9, 70], [1, 1, 1], (2, 1), 8, 128),
    "one tile of 16 rows": Paged([65, 128], [4, 4], (8, 2), 16, 64),
    "chunk of a prompt": Paged([5, 40], [5, 17], (4, 2), 16, 72),
    "many tiles": Paged([33, 64, 6], [1, 64, 3], (4, 1), 32, 128),
    "no rows, no context": Paged([0, 3, 0, 20], [0, 1, 1, 0], (2, 2), 4, 64),
    "three splits": Paged([1100, 513], [2, 1], (4, 1), 32, 80),
    "rows on both sides of a split": Paged([515], [6], (2, 2), 1, 64),
    "tree": Paged([12, 5], [4, 3], (2, 1), 8, 128, [0b0001, 0b0011, 0b0101, 0b1011, 0b001, 0b011, 0b111]),
    "tree of 64 rows": Paged([70], [64], (2, 1), 32, 64, [1 << i | 1 for i in range(63)] + [-1]),
}


@pytest.mark.parametrize("walk", [0, 1], ids=["splits side by side", "splits in one walk"])
@pytest.mark.parametrize("seed", [1, 2])
def test_values(program: Path, seed: int, walk: int, tmp_path: Path) -> None:
    calls = [batch.call(in_one_walk=walk, q_padding=2 * seed, replay=1 - walk) for batch in BATCHES.values()]
    found = harness.run(program, seed, calls, tmp_path / "calls")
    with ops.use_backends("eager"):
        for (name, batch), outputs in zip(BATCHES.items(), found, strict=True):
            truth, naive = (
                ops.paged_attention(*batch.arguments(torch.float64)),
                ops.paged_attention(*batch.arguments(torch.bfloat16)),
            )
            for what, out, exact, yard in zip(("o", "lse"), (outputs["o"], outputs["lse"]), truth, naive, strict=True):
                assert_close(out, yard, exact, f"{name}, {what}")


def same(found: dict[str, Tensor], expected: dict[str, Tensor], rows: slice) -> bool:
    return all(
        torch.equal(found[name].view(torch.int16), expected[name][rows].contiguous().view(torch.int16))
        for name in ("o", "lse")
    )


def check_own_bits(paged: type[Paged], asan: Path, folder: Path) -> None:
    """Decoded alone, verified in a chain, in a chunk, in any tile, splits side by side or in one walk."""
    whole = paged([1030], [40], (4, 2), 16, 64)
    chain = paged([1030], [40], (4, 2), 16, 64, [(2 << i) - 1 for i in range(40)])
    parts = [(1, 0), (1, 5), (1, 39), (4, 0), (8, 7), (20, 3)]  # rows, newer tokens that are not there yet
    calls = [whole.call(), whole.call(in_one_walk=1), chain.call()]
    calls += [whole.suffix(*part).call(in_one_walk=i % 2) for i, part in enumerate(parts)]
    full, walked, chained, *found = harness.run(asan, 1, calls, folder)
    assert same(walked, full, slice(None)) and same(chained, full, slice(None))
    for (count, drop), outputs in zip(parts, found, strict=True):
        assert same(outputs, full, slice(40 - drop - count, 40 - drop)), (count, drop)


def test_a_row_has_its_own_bits(asan: Path, tmp_path: Path) -> None:
    check_own_bits(Paged, asan, tmp_path / "calls")


def test_a_row_does_not_know_its_batch(asan: Path, tmp_path: Path) -> None:
    """Sequences beside it, blocks of another size, another table: the same bits."""
    alone = Paged([300], [3], (2, 1), 8, 64)
    beside = Paged([300, 700, 20], [3, 9, 1], (2, 1), 8, 64)
    other_blocks = Paged([300], [3], (2, 1), 32, 64)
    for block in (beside, other_blocks):
        block.q[:3] = alone.q
        for mine, cache in ((alone.k, block.k), (alone.v, block.v)):
            size = block.k.shape[2]
            for position in range(300):
                cache[block.table[0, position // size].long(), :, position % size] = mine[
                    alone.table[0, position // 8].long(), :, position % 8
                ]
    first, *others = harness.run(asan, 2, [alone.call(), beside.call(), other_blocks.call()], tmp_path / "calls")
    for other in others:
        assert same(first, other, slice(0, 3))


#: One group and two groups of rows, splits in one walk, side by side and folded by the last block.
MUTANT_CALLS = [
    Paged([600, 70], [2, 9], (4, 2), 32, 64).call(),
    Paged([600], [9], (4, 2), 32, 64).call(in_one_walk=1),
    Paged([600], [3], (2, 1), 32, 64).call(in_one_walk=1),
]


@pytest.mark.parametrize("wait", harness.waits(SOURCE))
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    """Each barrier, fence, commit and wait for copies left out in turn."""
    harness.check_wait(races, MUTANT_CALLS, tmp_path, wait)


def overrun_calls() -> list[Call]:
    """Every slot of the cache and every element of each buffer is in use."""
    exact = Paged([32, 544], [2, 2], (4, 2), 32, 64)
    tree = Paged([64], [2], (4, 2), 32, 64, [1, 3])
    tiles = Paged([64], [20], (4, 2), 32, 64)
    return [tree.call(), exact.call(), tiles.call()]


@pytest.mark.parametrize("plant", plants.ATTENTION, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    harness.check_plant(asan, overrun_calls(), tmp_path, plant)


def test_numbers_outside_the_cache_trap(asan: Path, tmp_path: Path) -> None:
    batches = [Paged([20], [1], (2, 1), 8, 64) for _ in range(4)]
    batches[0].table[0, 1] = 3
    batches[1].table[0, 0] = -1
    batches[2].context[0] = 25
    batches[3].bounds[1] = 2
    for i, batch in enumerate(batches):
        result = harness.execute(asan, 1, [batch.call()], tmp_path / str(i))
        assert result.returncode == harness.FAULT and "reached __trap at" in result.stderr


def test_a_head_size_that_no_kernel_has_is_refused(asan: Path, tmp_path: Path) -> None:
    result = harness.execute(asan, 1, [Paged([3], [1], (2, 1), 8, 96).call()], tmp_path / "call")
    assert "the launch returned CUDA error 1" in result.stderr
