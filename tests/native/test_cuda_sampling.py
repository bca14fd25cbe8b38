"""The CUDA sample without a GPU: on the host, in shuffled orders, token for token as the CPU draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Sample, good
from kvkeye.testing.cases.sampling import _call
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SOURCE = harness.CUDA / "sampling.cu"
FILES = [SOURCE, *(harness.CUDA / f"sampling_{part}.h" for part in ("block", "row", "cut", "draw"))]
NAMES = (
    "logits", "temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency", "history", "cu_history",
    "num_prompt", "seeds", "positions", "sample_index", "mask",
)  # fmt: skip
pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")


def call_of(arguments: tuple[Any, ...], padding: int = 0) -> Call:
    """`padding` columns of NaN behind each row of logits."""
    given = dict(zip(NAMES, arguments, strict=True))
    logits, mask = given.pop("logits"), given.pop("mask")
    rows, vocabulary = logits.shape
    stored = torch.cat([logits, torch.full((rows, padding), torch.nan, dtype=logits.dtype)], 1)
    numbers = {
        "rows": rows, "vocabulary": vocabulary, "logits_stride": vocabulary + padding, "masked": int(mask is not None),
        "history_size": len(given["history"]), "bf16": int(logits.dtype == torch.bfloat16),
    }  # fmt: skip
    buffers = {"logits": stored, "tokens": torch.full((rows,), -7), **given}
    return Call("sample", numbers, buffers if mask is None else buffers | {"mask": mask})


def drawn_by_cpu(arguments: tuple[Any, ...]) -> Tensor:
    with ops.use_backends("cpp,eager"):
        tokens: Tensor = ops.sample(*arguments)
    return tokens


def wide(seed: int, dtype: torch.dtype, *, scale: float, ties: float = 0.0, **settings: float) -> tuple[Any, ...]:
    """Two rows over a vocabulary of several slices; `ties` rounds logits to so many values per unit."""
    sample = Sample(dtype, seed=seed)
    logits = sample(2, 4500, scale=scale)
    return _call(sample, ((logits * ties).round() / ties).to(dtype) if ties else logits, **settings)


#: A nucleus of more tokens than a block can sort, many of them equal, at every limit of the temperature.
WIDE: dict[str, dict[str, float]] = {
    "plain": {"scale": 3.0},
    "top_k": {"scale": 0.3, "top_k": 2500},
    "top_p": {"scale": 0.3, "top_p": 0.9},
    "both, min_p": {"scale": 1.0, "top_k": 1500, "top_p": 0.8, "min_p": 0.05},
    "almost equal": {"scale": 0.01, "top_k": 700, "top_p": 0.5},
    "ties, top_k": {"scale": 1.0, "ties": 1, "top_k": 1100},
    "ties, top_p": {"scale": 1.0, "ties": 1, "top_p": 0.6},
    "all equal, top_k": {"scale": 0.0, "top_k": 3000},
    "all equal, top_p": {"scale": 0.0, "top_p": 0.37},
    "hot": {"scale": 1.0, "temperature": 1e4, "top_k": 900},
    "infinitely hot, top_k": {"scale": 1.0, "temperature": float("inf"), "top_k": 2000},
    "infinitely hot, top_p": {"scale": 1.0, "temperature": float("inf"), "top_p": 0.3},
    "cold": {"scale": 30.0, "temperature": 0.05, "top_k": 4000, "top_p": 0.999},
    "penalties": {"scale": 0.2, "top_p": 0.95, "repetition": 1.3, "presence": 0.5, "frequency": 0.2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_row_of_the_case_table(dtype: torch.dtype, asan: Path, tmp_path: Path) -> None:
    refuses = ops.sample.implementations["cuda"].refuses
    assert refuses is not None
    table = [case.args for case in good("sample", Sample(dtype)) if not list(refuses(*case.args))]
    assert table
    found = harness.run(asan, 1, [call_of(arguments, padding=3) for arguments in table], tmp_path / "calls")
    for arguments, outputs in zip(table, found, strict=True):
        assert torch.equal(outputs["tokens"], drawn_by_cpu(arguments))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_wide_nucleus(seed: int, asan: Path, tmp_path: Path) -> None:
    table = [wide(seed, torch.bfloat16 if seed == 2 else torch.float32, **given) for given in WIDE.values()]
    found = harness.run(asan, seed, [call_of(arguments) for arguments in table], tmp_path / "calls")
    for name, arguments, outputs in zip(WIDE, table, found, strict=True):
        assert torch.equal(outputs["tokens"], drawn_by_cpu(arguments)), name


def small_history() -> tuple[Any, ...]:
    return wide(3, torch.float32, scale=0.3, top_k=600, top_p=0.9, repetition=1.2, presence=0.1)


def test_a_row_does_not_know_its_batch(asan: Path, tmp_path: Path) -> None:
    both = small_history()
    history, bounds = both[8], both[9].tolist()
    alone = [
        tuple(
            history[bounds[b] : bounds[b + 1]] if name == "history"
            else torch.tensor([0, bounds[b + 1] - bounds[b]], dtype=torch.int32) if name == "cu_history"
            else value if value is None else value[b : b + 1]
            for name, value in zip(NAMES, both, strict=True)
        )
        for b in range(2)
    ]  # fmt: skip
    together, *apart = harness.run(asan, 1, [call_of(a) for a in (both, *alone)], tmp_path / "calls")
    assert together["tokens"].tolist() == [int(outputs["tokens"][0]) for outputs in apart]


def race_calls() -> list[Call]:
    """Every path: no cut, candidates in shared memory, a cut in one key, a cut by id; with penalties and without."""
    table = [case.args for case in good("sample", Sample(torch.float32)) if case.id in ("all", "top_p", "plain")]
    names = ("both, min_p", "ties, top_k")
    return [
        call_of(arguments)
        for arguments in (*table, small_history(), *(wide(1, torch.float32, **WIDE[n]) for n in names))
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_no_races(seed: int, races: Path, tmp_path: Path) -> None:
    harness.check_races(races, seed, race_calls(), tmp_path / "calls")


@pytest.mark.parametrize("wait", [wait for path in FILES for wait in harness.waits(path)])
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    harness.check_wait(races, race_calls(), tmp_path, wait)


@pytest.mark.parametrize("plant", plants.SAMPLING, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    one = wide(1, torch.float32, **WIDE["penalties"])
    masked = list(wide(1, torch.float32, scale=1.0))
    masked[14] = torch.full((2, 141), -1, dtype=torch.int32)
    harness.check_plant(asan, [call_of(one), call_of(tuple(masked))], tmp_path, plant)


def test_a_history_outside_the_vocabulary_traps(asan: Path, tmp_path: Path) -> None:
    arguments = list(wide(1, torch.float32, **WIDE["penalties"]))
    arguments[8][0] = 4500
    result = harness.execute(asan, 1, [call_of(tuple(arguments))], tmp_path / "call")
    assert result.returncode == harness.FAULT and "reached __trap at sampling_row.h:" in result.stderr
