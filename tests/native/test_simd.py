"""The portable vectors, and what stands on their rounding: compiled for each instruction set and run."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++")
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def flags(isa: str) -> list[str]:
    """The flags of the build, read from CMakeLists.txt so that the two cannot differ."""
    text = (ROOT / "CMakeLists.txt").read_text()
    if platform.machine() != "x86_64":
        return []
    found = {}
    for name, value in re.findall(r"set\((BASE|generic|avx2|avx512)_FLAGS ([^)]*)\)", text):
        found[name] = re.sub(r"\$\{(\w+)_FLAGS\}", lambda m: found[m[1]], " ".join(value.split()))
    return found[isa].split()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("name", ["simd_test", "sampling_test"])
def test_program_ends_well(name: str, isa: str, tmp_path: Path) -> None:
    needed = {"generic": "", "avx2": "avx2", "avx512": "avx512_bf16"}[isa]
    if isa != "generic" and not re.search(rf"\b{needed}\b", CPU_FLAGS):
        pytest.skip(f"this CPU has no {isa}")
    program, source = tmp_path / name, ROOT / "tests" / "native" / f"{name}.cpp"
    options = ["-std=gnu++17", "-O2", "-Wall", "-Wextra", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"]
    command = [
        str(COMPILER),
        *options,
        *flags(isa),
        f"-DKVKEYE_ISA={isa}",
        *(f"-I{ROOT / 'csrc' / part}" for part in ("include", "cpu")),
    ]
    built = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0 and not built.stderr, built.stderr
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr or f"killed by signal {-result.returncode}"
