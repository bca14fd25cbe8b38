"""The CUDA qk_norm_mrope_append without a GPU: on the host, in shuffled orders, against float64 and by mutants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Sample
from kvkeye.testing.compare import assert_close, widen
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SOURCE = harness.CUDA / "rope.cu"
pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


class Write:
    """Every slot of the cache is written, but for those that `skip` leaves out."""

    def __init__(
        self, tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, skip: int = 0, far: int = 4000
    ) -> None:
        sample = Sample(dtype)
        quarter = dim // 8
        self.sections = [dim // 2 - 2 * quarter - 3, quarter + 3, quarter]
        self.qkv = sample(tokens, (heads[0] + 2 * heads[1]) * dim)
        self.weights = sample(dim), sample(dim)
        self.positions = sample.integers(0, far, 3, tokens)
        self.caches = sample(-(-tokens // 4), heads[1], 4, dim), sample(-(-tokens // 4), heads[1], 4, dim)
        self.slots = sample.permutation(self.caches[0].shape[0] * 4)[:tokens].clone()
        self.slots[:skip] = -1

    def arguments(self) -> tuple[object, ...]:
        return (self.qkv, *self.weights, self.positions, *self.caches, self.slots, self.sections, 1e6, 1e-6)

    def expected(self, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (
            widen(self.arguments())
            if wide
            else tuple(a.clone() if isinstance(a, Tensor) else a for a in self.arguments())
        )
        with ops.use_backends("eager"):
            q = ops.qk_norm_mrope_append(*arguments)
        return q, arguments[4], arguments[5]

    def call(self, padding: int = 0) -> Call:
        """`padding` NaN between the rows of qkv and before the first."""
        tokens, width = self.qkv.shape
        dim = self.weights[0].numel()
        k_cache = self.caches[0]
        stored = torch.full((tokens, padding + width), torch.nan, dtype=self.qkv.dtype)
        stored[:, padding:] = self.qkv
        numbers = {
            "offset": padding, "stride": padding + width, "tokens": tokens, "head_dim": dim,
            "slots": k_cache.shape[0] * 4, "q_heads": width // dim - 2 * k_cache.shape[1], "kv_heads": k_cache.shape[1],
            "block_size": 4, "first_end": self.sections[0], "second_end": sum(self.sections[:2]),
            "bf16": int(self.qkv.dtype == torch.bfloat16), "fp8": 0,
        }  # fmt: skip
        frequency = 1e6 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        buffers = {
            "qkv": stored, "q_weight": self.weights[0], "k_weight": self.weights[1], "positions": self.positions,
            "k_cache": k_cache.clone(), "v_cache": self.caches[1].clone(), "slot_mapping": self.slots,
            "frequency": frequency.float(),
            "q": torch.full((tokens, numbers["q_heads"], dim), torch.nan, dtype=self.qkv.dtype),
        }  # fmt: skip
        return Call("qk_norm_mrope_append", numbers, buffers)


SHAPES = [(1, (2, 1), 128), (4, (4, 2), 64), (7, (5, 1), 256), (2, (14, 2), 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values(dtype: torch.dtype, program: Path, tmp_path: Path) -> None:
    writes = [Write(*shape, dtype, skip=shape[0] // 3) for shape in SHAPES]
    found = harness.run(program, 1, [write.call(padding=8 * i) for i, write in enumerate(writes)], tmp_path / "calls")
    for shape, write, outputs in zip(SHAPES, writes, found, strict=True):
        for name, truth, naive in zip(
            ("q", "k_cache", "v_cache"), write.expected(True), write.expected(False), strict=True
        ):
            assert_close(outputs[name], naive, truth, f"{shape}, {name}")


def test_far_positions(asan: Path, tmp_path: Path) -> None:
    """The angle's rounding to fp32 is the contract's; sine and cosine of it are right at any distance."""
    write = Write(4, (2, 1), 128, torch.float32, far=2**20)
    [found] = harness.run(asan, 1, [write.call()], tmp_path / "call")
    assert float((found["q"] - write.expected(False)[0]).abs().max()) < 2e-6 * float(found["q"].abs().max())


def test_a_token_does_not_know_its_batch(asan: Path, tmp_path: Path) -> None:
    together = Write(7, (4, 2), 128, torch.bfloat16)
    alone = object.__new__(Write)
    alone.__dict__ = dict(together.__dict__)
    alone.qkv, alone.positions, alone.slots = together.qkv[5:6], together.positions[:, 5:6], together.slots[5:6]
    all_rows, one = harness.run(asan, 1, [together.call(), alone.call()], tmp_path / "calls")
    slot = int(together.slots[5])
    assert torch.equal(all_rows["q"][5], one["q"][0])
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(all_rows[cache][slot // 4, :, slot % 4], one[cache][slot // 4, :, slot % 4])


@pytest.mark.parametrize("wait", harness.waits(SOURCE))
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    harness.check_wait(races, [Write(1, (2, 1), 128, torch.float32).call()], tmp_path, wait)


@pytest.mark.parametrize("plant", plants.ROPE, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    harness.check_plant(asan, [Write(4, (4, 2), 128, torch.float32).call()], tmp_path, plant)


def test_a_slot_outside_the_cache_traps(asan: Path, tmp_path: Path) -> None:
    write = Write(4, (2, 1), 64, torch.float32)
    write.slots[2] = 4
    result = harness.execute(asan, 1, [write.call()], tmp_path / "call")
    assert result.returncode == harness.FAULT and "reached __trap at rope.cu:" in result.stderr
