"""The CUDA fuse_tiles without a GPU: on the host, in shuffled orders, against the declaration in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Sample
from kvkeye.testing.cases.video_fusion import TILINGS, plan
from kvkeye.testing.compare import assert_close
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SOURCE = harness.CUDA / "video_fusion.cu"
#: More tiles than threads, planes of whole vectors, more vectors than threads.
WIDE = (
    ("many_tiles", 1, tuple(range(300)), (1, 2, 300, 1, 8)),
    ("vectors", 2, (0, 3, 6, 9), (3, 6, 15, 8, 88)),
)

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


def call_of(tiling: tuple, seed: int, dtype: torch.dtype, state: bool) -> Call:
    _, branches, starts, (channels, length, frames, height, width) = tiling
    sample = Sample(dtype, seed=seed)
    places, weights = plan(sample, starts, length, frames)
    numbers = {
        "branches": branches, "tiles": len(starts), "channels": channels, "length": length, "frames": frames,
        "plane": height * width, "guidance": 18 if branches == 2 else 4, "step": -1, "state": int(state),
        "bf16": int(dtype == torch.bfloat16),
    }  # fmt: skip
    buffers = {
        "outputs": sample(branches, len(starts), channels, length, height, width), "starts": places, "weights": weights,
        "out": torch.full((channels, frames, height, width), torch.nan),
    }  # fmt: skip
    if state:
        buffers["latent"] = sample.fp32(channels, frames, height, width)
    return Call("fuse_tiles", numbers, buffers)


def declared(call: Call, dtype: torch.dtype) -> Tensor:
    tensors = {n: b.to(dtype) if b.is_floating_point() else b for n, b in call.buffers.items()}
    tiles = (tensors["outputs"], tensors["starts"], tensors["weights"])
    guidance = call.numbers["guidance"] / 4
    if "latent" in tensors:
        return ops.fuse_tiles.reference(*tiles, tensors["latent"], guidance, call.numbers["step"] / 4)
    return ops.blend_tiles.reference(*tiles, call.numbers["frames"], guidance)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equals_the_declaration(program: Path, seed: int, tmp_path: Path) -> None:
    tilings = [t for t in (*TILINGS, *WIDE) if t[2]]
    dtypes = (torch.float32, torch.bfloat16)
    calls = [call_of(t, seed, dtype, state) for t in tilings for dtype in dtypes for state in (True, False)]
    for call, found in zip(calls, harness.run(program, seed, calls, tmp_path / "calls"), strict=True):
        naive, truth = declared(call, torch.float32), declared(call, torch.float64)
        assert_close(found["out"], naive, truth, str(call.numbers))


def test_tile_order_changes_no_bit(program: Path, tmp_path: Path) -> None:
    call = call_of(TILINGS[2], 4, torch.bfloat16, state=True)
    order = torch.tensor([2, 0, 3, 1])
    buffers = call.buffers | {"starts": call.buffers["starts"][order], "weights": call.buffers["weights"][order]}
    shuffled = Call(call.name, call.numbers, buffers | {"outputs": call.buffers["outputs"][:, order]})
    first, second = harness.run(program, 1, [call, shuffled], tmp_path / "calls")
    assert torch.equal(first["out"], second["out"])


def test_two_tiles_with_one_start_race(races: Path, tmp_path: Path) -> None:
    """The contract asks for different starts; the race checker sees why."""
    call = call_of(TILINGS[0], 1, torch.float32, state=True)
    call.buffers["starts"].fill_(2)
    result = harness.execute(races, 1, [call], tmp_path / "call")
    assert result.returncode == harness.FAULT and "data race in shared memory" in result.stderr


@pytest.mark.parametrize("wait", harness.waits(SOURCE))
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    harness.check_wait(races, [call_of(TILINGS[0], 1, torch.float32, state=True)], tmp_path, wait)


@pytest.mark.parametrize("plant", plants.VIDEO_FUSION, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    call = call_of(TILINGS[4], 1, torch.float32, state=True)  # one tile, whose last frame is the last of all buffers
    harness.check_plant(asan, [call], tmp_path, plant)
