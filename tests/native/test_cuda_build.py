"""What the CUDA compiler makes of the kernels, seen without a GPU: no spills, no local memory, no hard-wired torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))
LIBRARY = ROOT / "kvkeye" / "libkvkeye_cuda.so"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc)")
@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_keep_to_registers(source: Path, target: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas=-v", "-cubin", f"-I{ROOT / 'csrc' / 'include'}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stdout + result.stderr
    )
    assert usage, "ptxas reported no kernel"
    assert set(usage) == {("0", "0", "0")}


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
