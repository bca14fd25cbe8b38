"""What the CUDA compiler made of the kernels, read from the built library without a GPU, on every target of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native import cuda_resources as resources
from tests.native.cuda_resources import LIBRARY, MATRIX_KERNELS, TARGETS, Target

README = resources.harness.CUDA / "README.md"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no libkvkeye_cuda.so (no CUDA compiler)")
needs_tool = pytest.mark.skipif(
    resources.tool("cuobjdump") is None or shutil.which("c++filt") is None or resources.harness.COMPILER is None,
    reason="no cuobjdump (of a CUDA toolkit or of Triton), no c++filt or no g++",
)


@pytest.fixture(scope="session")
def launches(cuda_builds: Path, asan: Path) -> dict[str, resources.Launch]:
    return resources.launches(asan)


@needs_library
@needs_tool
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_kernels_keep_to_registers_and_shared_memory(target: Target, launches: dict[str, resources.Launch]) -> None:
    """No stack, no spills, no local memory; a launch that the target takes."""
    found = {kernel: usage for (name, kernel), usage in resources.usages().items() if name == target.name}
    assert set(found) == set(launches), "every kernel of the library is launched, and every launch has a kernel"
    for kernel, usage in found.items():
        assert (usage.stack, usage.local) == (0, 0), f"{kernel}: {usage}"
        assert launches[kernel].shared <= target.shared_per_block, kernel
        assert resources.blocks_per_multiprocessor(target, usage, launches[kernel]) >= 1, kernel


@needs_library
@needs_tool
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_matrix_kernels_use_tensor_cores(target: Target) -> None:
    """Their products are tensor-core instructions, fed by asynchronous copies and matrix loads."""
    found = resources.instructions(target.name)
    matrix = {kernel: opcodes for kernel, opcodes in found.items() if kernel.startswith(MATRIX_KERNELS)}
    assert len(matrix) == 12
    for kernel, opcodes in found.items():
        assert not [o for o in opcodes if o.startswith(("LDL", "STL"))], f"{kernel} uses local memory"
    for kernel, opcodes in matrix.items():
        dim = int(re.findall(r"\d+", kernel.partition(",")[2])[0])
        steps = -(-dim // 16)
        products = [o for o in opcodes if o.startswith(("HMMA", "HGMMA", "UTCHMMA"))]
        assert len(products) >= 4 * steps, f"{kernel}: two products of each step in scores and in outputs"
        assert any(o.startswith("LDGSTS") for o in opcodes) and any(o.startswith("LDSM") for o in opcodes), kernel


@needs_library
@needs_tool
def test_the_table_of_resources_is_true(asan: Path) -> None:
    """For the compiler that it names; another one gives other numbers (`python -m tests.native.cuda_resources`)."""
    text = README.read_text()
    named = re.search(r"compiler ([\d.]+);", text)
    assert named is not None
    if resources.compiler() != named[1]:
        pytest.skip(f"the table is of compiler {named[1]}, here is {resources.compiler()}")
    assert resources.table(asan) in text


@pytest.mark.skipif(
    not LIBRARY.exists() or shutil.which("readelf") is None, reason="no libkvkeye_cuda.so, or no readelf"
)
def test_library_needs_no_cuda_torch() -> None:
    """Linked against a CPU torch; the CUDA runtime is inside, libtorch_cuda is found when it is loaded."""
    dynamic = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name or "c10" in name]
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
