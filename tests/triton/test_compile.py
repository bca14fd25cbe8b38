"""Every kernel is compiled for GPUs that are not here; what the compiler made of it is checked.

A kernel that the interpreter runs may still not compile, may need more shared memory than an SM has, or may have
fallen back from matrix instructions to scalar code. None of that needs a GPU to be seen.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Bytes of shared memory that one program may take.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
USES_MATRICES = re.compile(
    r"_((varlen|tile)_attention_(fwd|bwd_dkv|bwd_dq)|paged_attention_fwd|packed_linear_fwd)_kernel"
)


#: Another Triton than the environment's, where `make peers` has put it.
OLDER = ROOT / ".peers" / "triton-3.6"


@functools.cache
def compiled(capability: int, package: Path | None = None) -> list[dict[str, Any]]:
    """One report per kernel and specialisation; all kernels for sm_90, those with matrix products for the others."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("the package triton is not installed, so there is no compiler for its kernels")
    if not (Path(found.origin).parent / "backends" / "nvidia" / "bin" / "ptxas").is_file():
        pytest.skip("this build of triton ships no ptxas, so it cannot assemble kernels for NVIDIA GPUs")
    parts = ["attention", "video", "linear"] + (["other"] if capability == 90 else [])
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    run = subprocess.run(
        [sys.executable, "-m", "tests.triton.compile_kernels", str(capability), *parts],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def check_copies(report: dict[str, Any]) -> None:
    """A pipelined tile is copied past the registers, 4 bytes or more at a time; one of a single stage by 16."""
    if report["shape"].endswith(" 1 stages"):
        assert report["wide_loads"] and not report["narrow_loads"], report
    else:
        assert report["async_copy_bytes"] and min(report["async_copy_bytes"]) >= 4, report


def test_every_kernel_is_among_them() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py"))
    assert {report["kernel"] for report in compiled(90)} == set(re.findall(r"def (_\w+_kernel)\(", sources))


@pytest.mark.parametrize("capability", SHARED)
def test_a_multiprocessor_holds_a_program(capability: int) -> None:
    """Its shared memory is within the target's limit, and its registers are too."""
    for report in compiled(capability):
        assert report["shared_bytes"] <= SHARED[capability] and report["warps"] > 0, report


@pytest.mark.parametrize("capability", SHARED)
def test_matrix_products_use_matrix_instructions(capability: int) -> None:
    reports = [r for r in compiled(capability) if USES_MATRICES.fullmatch(r["kernel"])]
    assert len({r["kernel"] for r in reports}) == 8
    for report in reports:
        assert MATRIX[capability] in report["matrix"], report


@pytest.mark.parametrize("capability", SHARED)
def test_tiles_are_copied_in_whole_vectors(capability: int) -> None:
    """D = 72 and K = 588 are not multiples of 16; copies of 2 bytes each would give that away."""
    for report in compiled(capability):
        if USES_MATRICES.fullmatch(report["kernel"]):
            check_copies(report)


@pytest.mark.parametrize("capability", SHARED)
def test_nothing_spills(capability: int) -> None:
    for report in compiled(capability):
        assert report["local_bytes"] == 0, report


@pytest.mark.parametrize("capability", SHARED)
def test_the_table_of_resources_is_true(capability: int) -> None:
    """For the version that it names; another one gives other numbers (`compile_kernels table` prints them)."""
    text = (ROOT / "triton_kernels" / "README.md").read_text()
    named, here = re.search(r"triton ([\d.]+);", text), importlib.metadata.version("triton")
    assert named is not None
    reports = [report for report in compiled(capability) if report["shape"]]
    from tests.triton.compile_kernels import table_row  # needs triton, without which `compiled` has skipped

    if here != named[1]:
        pytest.skip(f"the table is of triton {named[1]}, here is {here}")
    stated = [line for line in text.splitlines() if f"| sm_{capability} |" in line]
    assert sorted(stated) == sorted(table_row(capability, report) for report in reports)


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_another_version_compiles_them_as_well(capability: int) -> None:
    """Triton 3.6, which comes with torch 2.11: matrix instructions, shared memory within bounds, no spills."""
    if not OLDER.is_dir():
        pytest.skip(f"{OLDER.relative_to(ROOT)} is not there; `make peers` installs it")
    reports = compiled(capability, OLDER)
    assert {report["triton"] for report in reports} == {"3.6.0"}
    assert len(reports) == len(compiled(capability))
    for report in reports:
        assert report["shared_bytes"] <= SHARED[capability], report
        assert report["local_bytes"] == 0, report
        if USES_MATRICES.fullmatch(report["kernel"]):
            assert MATRIX[capability] in report["matrix"], report
            check_copies(report)
