"""The CUDA kernels without a GPU: the .cu files on the host, in shuffled orders, against the eager reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SEEDS = (1, 2, 3)

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


def caches(generator: torch.Generator, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 5, heads, 4, dim, generator=generator).to(dtype)
    return k.contiguous(), v.contiguous()


def append_call(generator: torch.Generator, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Call:
    """k and v are views of one qkv with four query heads."""
    k_cache, v_cache = caches(generator, heads, dim, dtype)
    slots = torch.randperm(20, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    size, row = k_cache.element_size(), (4 + 2 * heads) * dim
    numbers = {
        "one_source": 1, "k_offset": 4 * dim * size, "v_offset": (4 + heads) * dim * size,
        "token_stride": row * size, "head_stride": dim * size, "slots": 20, "heads": heads, "block_size": 4,
        "row_bytes": dim * size, "tokens": tokens,
    }  # fmt: skip
    qkv = torch.randn(tokens, row, generator=generator).to(dtype)
    return Call("append_kv", numbers, {"qkv": qkv, "slot_mapping": slots, "k_cache": k_cache, "v_cache": v_cache})


def appended(call: Call) -> dict[str, Tensor]:
    heads, tokens = call.numbers["heads"], call.numbers["tokens"]
    k, v = call.buffers["qkv"].view(tokens, 4 + 2 * heads, -1)[:, 4:].chunk(2, dim=1)
    k_cache, v_cache = call.buffers["k_cache"].clone(), call.buffers["v_cache"].clone()
    with ops.use_backends("eager"):
        ops.append_kv(k, v, k_cache, v_cache, call.buffers["slot_mapping"])
    return {"k_cache": k_cache, "v_cache": v_cache}


@pytest.mark.parametrize("seed", SEEDS)
def test_append_kv(program: Path, seed: int, tmp_path: Path) -> None:
    """Words of 16, 4 and 2 bytes; one thread for several words and several threads for one head."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 1, 3), (6, 2, 72), (11, 3, 128), (4, 2, 6)]
    calls = [append_call(generator, *shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    for call, found in zip(calls, harness.run(program, seed, calls, tmp_path / "calls"), strict=True):
        expected = appended(call)
        assert all(torch.equal(found[name], expected[name]) for name in expected), call.numbers


def copy_call(generator: torch.Generator, dim: int, pairs: list[list[int]]) -> Call:
    k_cache, v_cache = caches(generator, 2, dim, torch.bfloat16)
    numbers = {"blocks": 5, "block_bytes": 2 * 4 * dim * 2, "pairs": len(pairs)}
    block_pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return Call("copy_blocks", numbers, {"k_cache": k_cache, "v_cache": v_cache, "block_pairs": block_pairs})


@pytest.mark.parametrize("seed", SEEDS)
def test_copy_blocks(program: Path, seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    calls = [copy_call(generator, dim, pairs) for dim in (1, 72, 320) for pairs in ([[0, 3], [0, 4], [2, 1]], [[1, 1]])]
    for call, found in zip(calls, harness.run(program, seed, calls, tmp_path / "calls"), strict=True):
        k_cache, v_cache = call.buffers["k_cache"].clone(), call.buffers["v_cache"].clone()
        with ops.use_backends("eager"):
            ops.copy_blocks(k_cache, v_cache, call.buffers["block_pairs"])
        assert torch.equal(found["k_cache"], k_cache) and torch.equal(found["v_cache"], v_cache), call.numbers


def test_indices_outside_the_cache_trap(asan: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    far = append_call(generator, 3, 1, 8, torch.float32)
    far.buffers["slot_mapping"][0] = 20
    for i, call in enumerate([far, copy_call(generator, 8, [[0, 5]]), copy_call(generator, 8, [[-1, 0]])]):
        result = harness.execute(asan, 1, [call], tmp_path / str(i))
        assert result.returncode == harness.FAULT and "reached __trap at kv_cache.cu:" in result.stderr


def test_two_pairs_with_one_target_race(races: Path, tmp_path: Path) -> None:
    """The contract asks for distinct targets; the race checker sees why."""
    call = copy_call(torch.Generator().manual_seed(0), 8, [[0, 3], [1, 3]])
    result = harness.execute(races, 1, [call], tmp_path / "call")
    assert result.returncode == harness.FAULT and "data race in k_cache" in result.stderr


@pytest.mark.parametrize("plant", plants.KV_CACHE, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    """The last token goes to the last slot, the last pair to the last block. These kernels wait for nothing."""
    generator = torch.Generator().manual_seed(0)
    append = append_call(generator, 3, 2, 72, torch.bfloat16)
    append.buffers["slot_mapping"][:] = torch.tensor([17, 18, 19])
    calls = [append, copy_call(generator, 72, [[0, 4]])]
    harness.check_plant(asan, calls, tmp_path, plant)
