"""FP8 caches in CUDA without a GPU: levels and scales are the reference's bit for bit, rows keep their own bits."""

from __future__ import annotations

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
from tests.native.test_cuda_attention import Paged, check_own_bits
from tests.native.test_cuda_rope import Write

FP8 = torch.float8_e4m3fn
NAN_LEVEL = 0x7F
pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


def empty_cache(*shape: int) -> tuple[Tensor, Tensor]:
    """Levels [*shape] and scales [*shape[:-1]] that no kernel writes."""
    return torch.full(shape, 0x55, dtype=torch.uint8).view(FP8), torch.full(shape[:-1], 123.0)


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, H, D] through the reference -> levels [T, H, D], scales [T, H]."""
    levels, scales = empty_cache(len(rows), rows.shape[1], 1, rows.shape[2])
    with ops.use_backends("eager"):
        ops.append_kv(rows, rows, levels, levels.clone(), torch.arange(len(rows)), scales, scales.clone())
    return levels[:, :, 0], scales[:, :, 0]


def equal(found: Tensor, expected: Tensor) -> bool:
    if expected.dtype == FP8:
        return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


# Writes


def append_call(k: Tensor, v: Tensor, slots: Tensor, blocks: int) -> Call:
    """k and v [T, H, D] as two views of one qkv that has a query head too; blocks of 4 slots."""
    tokens, heads, dim = k.shape
    qkv = torch.cat((torch.full((tokens, 1, dim), torch.nan, dtype=k.dtype), k, v), 1)
    (k_cache, k_scales), (v_cache, v_scales) = (empty_cache(blocks, heads, 4, dim) for _ in "kv")
    row = dim * qkv.element_size()
    numbers = {
        "one_source": 1, "k_offset": row, "v_offset": (1 + heads) * row, "token_stride": (1 + 2 * heads) * row,
        "head_stride": row, "slots": 4 * blocks, "heads": heads, "block_size": 4, "row_bytes": dim, "tokens": tokens,
    }  # fmt: skip
    buffers = {
        "qkv": qkv, "slot_mapping": slots, "k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales,
        "v_scales": v_scales,
    }  # fmt: skip
    return Call("quantize_kv", numbers, buffers)


def check_appended(call: Call, k: Tensor, v: Tensor, found: dict[str, Tensor]) -> None:
    expected = {name: call.buffers[name].clone() for name in ("k_cache", "v_cache", "k_scales", "v_scales")}
    with ops.use_backends("eager"):
        ops.append_kv(
            k, v, expected["k_cache"], expected["v_cache"], call.buffers["slot_mapping"], expected["k_scales"],
            expected["v_scales"],
        )  # fmt: skip
    for name, tensor in expected.items():
        assert equal(found[name], tensor), f"{name}, {tuple(k.shape)}"


def odd_rows(tokens: int, heads: int, dim: int) -> Tensor:
    """Normal rows; of zeros; with one value far above the rest; at both ends of fp32; not finite."""
    rows = Sample(torch.bfloat16)(tokens, heads, dim)
    scales = torch.tensor([1.0, 0.0, 1e-42, 3e-38, 1e37, 1.0, 1.0, 1.0])[torch.arange(tokens) % 8]
    rows = (rows.float() * scales[:, None, None]).bfloat16()
    for token, value in ((5, float("inf")), (6, float("nan")), (7, 1e30)):
        rows[token::8, :, 1] = value
    return rows


def test_append_kv(program: Path, tmp_path: Path) -> None:
    rows = [(odd_rows(16, heads, dim), odd_rows(16, heads, dim).flip(0)) for heads, dim in ((1, 64), (3, 128), (5, 6))]
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16]
    slots[3] = -1
    calls = [append_call(k, v, slots, 5) for k, v in rows]
    for call, pair, found in zip(calls, rows, harness.run(program, 1, calls, tmp_path / "calls"), strict=True):
        check_appended(call, *pair, found)
        assert not bool(((found["k_cache"].view(torch.uint8) & 0x7F) == NAN_LEVEL).any())


def test_every_value_is_rounded_to_the_nearest_level(asan: Path, tmp_path: Path) -> None:
    """All bf16 numbers up to 448, in rows whose scale is 1; the reference's rounding is PyTorch's conversion."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.float().abs() <= 448]
    values = torch.cat((values, values.new_zeros(-len(values) % 512))).view(-1, 512)
    rows = torch.cat((values.new_full((len(values), 1), 448), values), -1)[:, None]  # [T, 1, 513]
    call = append_call(rows, rows, torch.arange(len(rows)), -(-len(rows) // 4))
    [found] = harness.run(asan, 1, [call], tmp_path / "call")
    levels = found["k_cache"].transpose(1, 2).flatten(0, 2)[: len(rows)]
    assert bool((found["k_scales"].flatten()[: len(rows)] == 1).all())
    assert equal(levels, rows[:, 0].float().to(FP8))


def fp8_call(write: Write) -> Call:
    call, shape = write.call(), write.caches[0].shape
    (k_cache, k_scales), (v_cache, v_scales) = empty_cache(*shape), empty_cache(*shape)
    caches = {"k_cache": k_cache, "v_cache": v_cache, "k_scales": k_scales, "v_scales": v_scales}
    return Call(call.name, {**call.numbers, "fp8": 1}, {**call.buffers, **caches})


def test_qk_norm_mrope_append(program: Path, tmp_path: Path) -> None:
    """Queries are those of the bf16 call; levels and scales are what the reference makes of its cache."""
    writes = [Write(*shape, torch.bfloat16, skip=1) for shape in ((5, (2, 1), 128), (6, (4, 2), 64), (2, (14, 2), 128))]
    writes[0].qkv[2, -1], writes[0].qkv[3, 128 * 2 : 128 * 3] = float("inf"), 0.0
    calls = [call for write in writes for call in (write.call(), fp8_call(write))]
    found = harness.run(program, 1, calls, tmp_path / "calls")
    for write, plain, fp8 in zip(writes, found[::2], found[1::2], strict=True):
        assert torch.equal(fp8["q"].view(torch.int16), plain["q"].view(torch.int16))
        for name in "kv":
            rows = plain[f"{name}_cache"].transpose(1, 2).flatten(0, 1)  # [slots, H, D]
            levels = fp8[f"{name}_cache"].transpose(1, 2).flatten(0, 1)
            scales = fp8[f"{name}_scales"].transpose(1, 2).flatten(0, 1)
            written = write.slots[write.slots >= 0]
            for one, other in zip((levels[written], scales[written]), quantized(rows[written]), strict=True):
                assert equal(one, other), name
            assert int((scales == 123).sum()) == (len(scales) - len(written)) * scales.shape[1]


# Attention


class QuantizedPaged(Paged):
    """The sequences in e4m3; what is not theirs has NaN scales and the level that is no number."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.scales = []
        for name in ("k", "v"):
            cache = getattr(self, name)
            levels, scales = quantized(cache.flatten(0, 1))  # [N * H, P, D]
            levels.view(torch.uint8)[scales.isnan()] = NAN_LEVEL
            setattr(self, name, levels.view(cache.shape))
            self.scales.append(scales.view(cache.shape[:3]))

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Caches and scales follow `dtype` only to float64, where the truth is computed."""
        wide = torch.float64 if dtype == torch.float64 else None
        caches, scales = ([t.to(wide) if wide else t for t in pair] for pair in ((self.k, self.v), self.scales))
        rest = self.table, self.bounds, self.context, self.tree, self.q.shape[2] ** -0.5
        return self.q.to(dtype), *caches, *rest, *scales

    def call(self, **numbers: int) -> Call:
        call = super().call(**numbers)
        return Call(
            call.name,
            {**call.numbers, "fp8": 1},
            {**call.buffers, "k_scales": self.scales[0], "v_scales": self.scales[1]},
        )


BATCHES: dict[str, QuantizedPaged] = {
    "decode": QuantizedPaged([1, 9, 70], [1, 1, 1], (2, 1), 8, 128),
    "many tiles": QuantizedPaged([33, 64, 6], [1, 64, 3], (4, 1), 32, 128),
    "no rows, no context": QuantizedPaged([0, 3, 0, 20], [0, 1, 1, 0], (2, 2), 4, 64),
    "three splits": QuantizedPaged([1100, 513], [2, 1], (4, 1), 32, 64),
    "tree": QuantizedPaged([12, 5], [4, 3], (2, 1), 8, 128, [0b0001, 0b0011, 0b0101, 0b1011, 0b001, 0b011, 0b111]),
}


@pytest.mark.parametrize("walk", [0, 1], ids=["splits side by side", "splits in one walk"])
def test_values(program: Path, walk: int, tmp_path: Path) -> None:
    calls = [batch.call(in_one_walk=walk, q_padding=2, replay=1 - walk) for batch in BATCHES.values()]
    reference = ops.paged_attention.reference
    for (name, batch), outputs in zip(
        BATCHES.items(), harness.run(program, 1 + walk, calls, tmp_path / "calls"), strict=True
    ):
        truth, naive = reference(*batch.arguments(torch.float64)), reference(*batch.arguments(torch.bfloat16))
        for what, exact, yard in zip(("o", "lse"), truth, naive, strict=True):
            assert_close(outputs[what], yard, exact, f"{name}, {what}")


def test_every_level_is_read_exactly(asan: Path, tmp_path: Path) -> None:
    """One key with weight 1: the output is its value, 256 levels in two heads of 128 dimensions."""
    batch = QuantizedPaged([1], [1], (2, 2), 1, 128)
    batch.v = torch.arange(256, dtype=torch.uint8).view(1, 2, 1, 128).view(FP8)
    batch.scales[1] = torch.ones(1, 2, 1)
    [found] = harness.run(asan, 1, [batch.call()], tmp_path / "call")
    levels = batch.v.float().view(2, 128)
    is_number = levels.isfinite()
    assert int(is_number.sum()) == 254
    assert torch.equal(found["o"][0].float()[is_number], levels[is_number])


def test_nan_scales_give_nan(asan: Path, tmp_path: Path) -> None:
    """A key or a value that was not finite shows in every row that sees it, in no other."""
    for scales in (0, 1):
        batch = QuantizedPaged([70], [6], (2, 1), 8, 64)
        block, place = int(batch.table[0, 67 // 8]), 67 % 8
        batch.scales[scales][block, 0, place] = torch.nan
        (found,) = harness.run(asan, 1, [batch.call()], tmp_path / str(scales))
        assert bool(found["o"][3:].isnan().all())
        if scales == 0:
            assert bool(found["o"][:3].isfinite().all())


def test_a_row_has_its_own_bits(asan: Path, tmp_path: Path) -> None:
    check_own_bits(QuantizedPaged, asan, tmp_path / "calls")


@pytest.mark.parametrize("wait", harness.waits(harness.CUDA / "paged_attention.cu"))
def test_every_wait_of_attention_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    calls = [QuantizedPaged([600], [9], (4, 2), 32, 64), QuantizedPaged([600], [3], (2, 1), 32, 64)]
    walks = [calls[0].call(), *(batch.call(in_one_walk=1) for batch in calls)]
    harness.check_wait(races, walks, tmp_path, wait)


def exact_calls() -> list[Call]:
    """Every slot of the caches is written or read."""
    rows = odd_rows(4, 2, 64)
    return [
        QuantizedPaged([32, 544], [2, 2], (4, 2), 32, 64).call(),
        fp8_call(Write(4, (4, 2), 128, torch.bfloat16)),
        append_call(rows, rows, torch.arange(4), 1),
    ]


@pytest.mark.parametrize("plant", plants.FP8, ids=lambda plant: f"{plant.file} {plant.name}")
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    harness.check_plant(asan, exact_calls(), tmp_path, plant)


def test_a_slot_outside_the_cache_traps(asan: Path, tmp_path: Path) -> None:
    rows = odd_rows(4, 1, 64)
    result = harness.execute(asan, 1, [append_call(rows, rows, torch.tensor([0, 1, 4, 2]), 1)], tmp_path / "call")
    assert result.returncode == harness.FAULT and "reached __trap at kv_cache.cu:" in result.stderr


def test_sizes_that_no_kernel_has_are_refused(asan: Path, tmp_path: Path) -> None:
    calls = [QuantizedPaged([3], [1], (2, 1), 8, 80).call(), fp8_call(Write(1, (2, 1), 256, torch.bfloat16))]
    for i, call in enumerate(calls):
        result = harness.execute(asan, 1, [call], tmp_path / str(i))
        assert "the launch returned CUDA error 1" in result.stderr
