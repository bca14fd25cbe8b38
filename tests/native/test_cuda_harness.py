"""The host harness itself: right kernels give right results in any order, each planted fault is found and named."""

from __future__ import annotations

import importlib
import inspect
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.native import cuda_harness as harness

DEMO = harness.ROOT / "tests" / "native" / "cuda" / "demo.cu"
THREADS = 96

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


@pytest.fixture(scope="session")
def asan(cuda_builds: Path) -> Path:
    return harness.build("asan", cuda_builds, [DEMO])


@pytest.fixture(scope="session")
def races(cuda_builds: Path) -> Path:
    return harness.build("races", cuda_builds, [DEMO])


def demo(
    name: str, words: Tensor, *, out: int = 0, blocks: int = 1, threads: int = THREADS, shared: int = 1
) -> harness.Call:
    """`shared` counts lines of THREADS words."""
    numbers = {"blocks": blocks, "threads": threads, "shared": shared}
    return harness.Call(name, numbers, {"in": words, "out": torch.zeros(out or len(words), dtype=torch.int32)})


def words(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(torch.int32)


def complaint(program: Path, call: harness.Call, tmp_path: Path, seed: int = 1) -> str:
    result = harness.execute(program, seed, [call], tmp_path / f"{program.name}{seed}")
    assert result.returncode != 0, "the fault went unseen"
    return result.stderr


def reversed_blocks(x: Tensor) -> Tensor:
    return x.view(-1, THREADS).flip(1).reshape(-1)


@pytest.mark.parametrize("flavour", ["asan", "races"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_right_kernels(flavour: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    x, four = words(THREADS), words(4 * THREADS)
    calls = [
        demo("reverse", four, blocks=4),
        demo("rotate", x),
        demo("warp", x, out=5 * THREADS),
        demo("count", x, out=3),
    ]
    back, rotated, warp, count = harness.run(request.getfixturevalue(flavour), seed, calls, tmp_path / "calls")
    warps = x.view(-1, 32)
    assert torch.equal(back["out"], reversed_blocks(four))
    assert torch.equal(rotated["out"], warps.roll(-1, 1).reshape(-1))
    total, eighth, before, votes, any_all = warp["out"].view(THREADS, 5).unbind(1)
    assert torch.equal(total, warps.sum(1).repeat_interleave(32).int())
    assert torch.equal(eighth, x.view(-1, 8).sum(1).repeat_interleave(8).int())
    shifted = warps.roll(1, 1)
    shifted[:, 0] = warps[:, 0]
    assert torch.equal(before, shifted.reshape(-1))
    bits = ((warps & 1).long() << torch.arange(32)).sum(1).repeat_interleave(32)
    assert torch.equal(votes.long() & 0xFFFFFFFF, bits)
    assert torch.equal(any_all, (2 * (warps == 7).any(1) + 1).repeat_interleave(32).int())
    assert count["out"].tolist() == [THREADS * THREADS // 2, THREADS, THREADS - 1]


@pytest.mark.parametrize("flavour", ["asan", "races"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_right_copies_folds_and_products(
    flavour: str, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, v = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((16, 16), (8, 16), (16, 16)))
    operands = torch.cat([a, b, v]).view(torch.int32).view(-1)
    lines = words(4 * THREADS)
    calls = [
        demo("copy", lines, shared=4),
        demo("fold", words(5), out=7, blocks=5, shared=0),
        demo("product", operands, out=128 + 256, threads=32, shared=4),
    ]
    copy, fold, product = harness.run(request.getfixturevalue(flavour), seed, calls, tmp_path / "calls")
    even = lines.view(THREADS, 4) * (torch.arange(THREADS) % 2 == 0)[:, None]
    assert torch.equal(copy["out"].view(THREADS, 4), even.flip(0).int())
    assert fold["out"].tolist() == [0, 10, *words(5).tolist()]
    found = product["out"].view(torch.float32)
    assert torch.allclose(found[:128].view(16, 8), a.float() @ b.float().T, atol=1e-5)
    assert torch.allclose(found[128:].view(16, 16), a.float() @ v.float(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy_no_commit", "while an asynchronous copy to it is on its way"),
        ("copy_no_wait", "while an asynchronous copy to it is on its way"),
        ("copy_no_barrier", "shared memory, byte"),
        ("fold_no_fence_before", "data race in out, byte"),
        ("fold_no_fence_after", "data race in out, byte"),
    ],
)
def test_copies_and_blocks_that_nothing_orders(name: str, expected: str, races: Path, tmp_path: Path) -> None:
    """In every order, also where the values come out right."""
    for seed in (1, 2, 3):
        blocks, count = (5, 5) if name.startswith("fold") else (1, 4 * THREADS)
        call = demo(name, words(count), out=count + 2, blocks=blocks, shared=4)
        assert expected in complaint(races, call, tmp_path, seed)


def test_blocks_run_side_by_side(asan: Path, tmp_path: Path) -> None:
    call = demo("order", words(1), out=1 + 3 * THREADS, blocks=3, shared=0)
    runs = [harness.run(asan, seed, [call], tmp_path / str(seed))[0]["out"][1:] for seed in range(1, 7)]
    alone = [all(int(block.max() - block.min()) == THREADS - 1 for block in run.view(3, THREADS)) for run in runs]
    assert set(alone) == {True, False}, "one after the other under some seeds, mixed under others"


def test_orders_differ_by_seed_and_repeat(asan: Path, tmp_path: Path) -> None:
    call = demo("order", words(1), out=1 + 3 * THREADS, blocks=3, shared=0)
    seen = [
        harness.run(asan, seed, [call], tmp_path / str(i))[0]["out"][1:].tolist() for i, seed in enumerate([1, 1, 2])
    ]
    assert seen[0] == seen[1] != seen[2]
    assert sorted(seen[0]) == list(range(3 * THREADS)) != seen[0]


# What is wrong, how the program ends, and words of its complaint.
FAULTS = [
    ("global_overrun", "heap-buffer-overflow"),
    ("shared_overrun", "heap-buffer-overflow"),
    ("member_overrun", "index 96 out of bounds"),
    ("misaligned", "misaligned address"),
    ("one_returns", "94 more|thread (5, 0, 0) has returned|__syncthreads at demo.cu:"),
    ("two_barriers", "different barriers|__syncthreads at demo.cu:|31 more|63 more"),
    ("missing_lane", "::missing_lane_kernel,|(3, 0, 0) has returned|__shfl_xor_sync of lanes 0xffffffff"),
    ("silent_lane", "reads lane 20 by __shfl_sync at demo.cu:|only lanes 0x0000ffff"),
    ("trap", "block (1, 0, 0), seed 1: thread (7, 0, 0) reached __trap at demo.cu:"),
]


@pytest.mark.parametrize(("name", "expected"), FAULTS, ids=[name for name, _ in FAULTS])
def test_faults_are_found_and_named(name: str, expected: str, asan: Path, tmp_path: Path) -> None:
    shared = 2 if name == "member_overrun" else 1
    said = complaint(asan, demo(name, words(THREADS), blocks=2 if name == "trap" else 1, shared=shared), tmp_path)
    assert all(part in said for part in expected.split("|")), said


def test_shared_memory_starts_as_poison(asan: Path, tmp_path: Path) -> None:
    [found] = harness.run(asan, 1, [demo("unwritten", words(THREADS))], tmp_path / "calls")
    assert found["out"].eq(-1).all(), "0xff in every byte: a NaN for every floating type"
    too_little = complaint(asan, demo("unwritten", words(THREADS), shared=0), tmp_path)
    assert "a struct of 384 bytes in shared memory; the launch gave 0" in too_little


def test_sizes_that_no_gpu_takes(asan: Path, tmp_path: Path) -> None:
    for i, call in enumerate([demo("order", words(1), threads=1025), demo("order", words(1), shared=700)]):
        assert "the launch returned CUDA error 9" in complaint(asan, call, tmp_path / str(i))


def test_a_race_is_found_where_the_result_is_right(races: Path, tmp_path: Path) -> None:
    said = complaint(races, demo("same_word", words(1), blocks=3), tmp_path)
    assert "data race in out, byte 0 of 4" in said and "nothing orders the two" in said


@pytest.mark.parametrize(("define", "name"), [("WITHOUT_BARRIER", "reverse"), ("WITHOUT_SYNCWARP", "rotate")])
def test_a_removed_wait_is_caught(define: str, name: str, cuda_builds: Path, tmp_path: Path) -> None:
    """By the race checker under every seed; by wrong results, from poison, under some."""
    x = words(THREADS)
    races = harness.build("races", cuda_builds, [DEMO], [define])
    for seed in (1, 2, 3):
        assert "data race in shared memory" in complaint(races, demo(name, x), tmp_path, seed)
    asan = harness.build("asan", cuda_builds, [DEMO], [define])
    for seed in (1, 2, 3):
        [found] = harness.run(asan, seed, [demo(name, x)], tmp_path / f"result{seed}")
        assert found["out"].eq(-1).any(), "a thread ran ahead and read poison"


def test_a_barrier_with_a_value_that_is_left_out_orders_nothing(races: Path, tmp_path: Path) -> None:
    """It gives its value all the same: what is seen is the missing order."""
    lines = DEMO.read_text().splitlines()
    [wait] = [w for w in harness.waits(DEMO) if lines[int(w.partition(":")[2]) - 1].endswith("// reversed")]
    call = demo("counted_reverse", words(THREADS))
    [found] = harness.run(races, 1, [call], tmp_path / "whole")
    assert torch.equal(found["out"], THREADS // 2 * words(THREADS).flip(0))
    result = harness.execute(races, 1, [call], tmp_path / "without", wait)
    assert "data race in shared memory" in result.stderr


# Whatever makes a thread wait, or others see what it did; not its definition.
WAITING = re.compile(
    r"^(?!.*__device__).*(?:__(?:syncthreads|syncwarp|threadfence)\w*|(?:commit|wait)_copies|\bwait)\b.*\("
)


def left_out_by_tests() -> Iterator[str]:
    """The waits that the tests of all kernels are asked to leave out."""
    for path in Path(__file__).parent.glob("test_cuda_*.py"):
        for function in vars(importlib.import_module(f"tests.native.{path.stem}")).values():
            for mark in getattr(function, "pytestmark", []) if inspect.isfunction(function) else []:
                if mark.name == "parametrize" and mark.args[0] == "wait":
                    yield from mark.args[1]


def test_some_test_leaves_out_every_wait_of_every_kernel() -> None:
    tested = set(left_out_by_tests())
    for path in sorted(harness.CUDA.iterdir()):
        if path.suffix in (".cu", ".h") and path.name != "ptx.h":
            code = [line.partition("//")[0] for line in path.read_text().splitlines()]
            places = {f"{path.name}:{n}" for n, line in enumerate(code, 1) if WAITING.match(line)}
            assert places == set(harness.waits(path)), "the harness knows the statement"
            assert places <= tested, f"no test leaves out {sorted(places - tested)}"


def test_two_hundred_blocks_of_256_threads(asan: Path, tmp_path: Path) -> None:
    """The suite can afford real launches: a fraction of a second of processor time."""
    call = demo("order", words(1), out=1 + 200 * 256, blocks=200, threads=256)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    [found] = harness.run(asan, 1, [call], tmp_path / "calls")
    assert found["out"][0] == 200 * 256
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3


def test_the_portable_switch(cuda_builds: Path, tmp_path: Path) -> None:
    """Where the switch is not written by hand, swapcontext gives the same results."""
    program = harness.build("races", cuda_builds, [DEMO], ["KVKEYE_UCONTEXT"])
    x = words(4 * THREADS)
    [found] = harness.run(program, 1, [demo("reverse", x, blocks=4)], tmp_path / "calls")
    assert torch.equal(found["out"], reversed_blocks(x))
