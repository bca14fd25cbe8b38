"""What each CUDA kernel takes on each target, read from the built library: registers, shared memory, occupancy.

`python -m tests.native.cuda_resources` prints the table that stands in csrc/cuda/README.md. Needs no GPU: registers
come from cuobjdump (of a CUDA toolkit or of the package triton), launches from the kernels' host build.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.native import cuda_harness as harness

LIBRARY = harness.ROOT / "kvkeye" / "libkvkeye_cuda.so"
#: Kernels whose work is matrix products.
MATRIX_KERNELS = ("paged_attention_kernel",)


@dataclass(frozen=True)
class Target:
    """Limits of a multiprocessor. Source: CUDA C++ Programming Guide, table of compute capabilities."""

    name: str
    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 64 << 10


TARGETS = (
    Target("sm_80", 163 << 10, 164 << 10, 64, 32),
    Target("sm_90a", 227 << 10, 228 << 10, 64, 32),
    Target("sm_100", 227 << 10, 228 << 10, 64, 32),
    Target("sm_120", 99 << 10, 100 << 10, 48, 24),
)


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int
    local: int


@dataclass(frozen=True)
class Launch:
    threads: int
    shared: int


def tool(name: str) -> Path | None:
    """A CUDA binary tool on the path, or the one that Triton brings."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / "backends" / "nvidia" / "bin" / name if folders else None
    return path if path is not None and path.exists() else None


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def short(name: str) -> str:
    """A kernel without its namespaces and parameters: "sample_kernel<float>"."""
    name = re.sub(r"\(anonymous namespace\)::|\{anonymous\}::|kvkeye::(cuda::)?|^void |\((int|bool)\)", "", name)
    name = name.replace("short unsigned int", "unsigned short")  # g++ and the demangler differ
    return name.partition("(")[0]


def demangled(names: list[str]) -> dict[str, str]:
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(line) for name, line in zip(names, lines.splitlines(), strict=True)}


@functools.cache
def usages() -> dict[tuple[str, str], Usage]:
    """By (target, kernel)."""
    found: dict[tuple[str, str], Usage] = {}
    target = ""
    for line in _output(str(tool("cuobjdump")), "-res-usage", str(LIBRARY)).splitlines():
        if (arch := re.search(r"arch = (sm_\w+)", line)) is not None:
            target = arch[1]
        elif (function := re.search(r"Function (\w+):", line)) is not None:
            name = function[1]
        elif (numbers := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line)) is not None:
            found[target, name] = Usage(*map(int, numbers.groups()))
    names = demangled(sorted({name for _, name in found}))
    return {(target, names[name]): usage for (target, name), usage in found.items()}


def compiler() -> str:
    """The version of the CUDA compiler that the build found."""
    cache = harness.ROOT / "build" / "native" / "CMakeFiles"
    found = [
        re.search(r'CMAKE_CUDA_COMPILER_VERSION "([^"]+)"', p.read_text())
        for p in cache.glob("*/CMakeCUDACompiler.cmake")
    ]
    return next((match[1] for match in found if match), "unknown")


@functools.cache
def launches(program: Path) -> dict[str, Launch]:
    """Threads and shared memory of each kernel, as the launchers of the host build ask for them."""
    with tempfile.TemporaryDirectory() as folder:
        printed = harness.execute(program, 1, [harness.Call("launches", {}, {})], Path(folder) / "call").stdout
    rows = [line.split(" ", 2) for line in printed.splitlines()]
    return {short(name): Launch(int(threads), int(shared)) for threads, shared, name in rows}


def instructions(target: str) -> dict[str, list[str]]:
    """The names of the machine instructions of each kernel."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in _output(str(tool("cuobjdump")), "-sass", "-arch", target, str(LIBRARY)).splitlines():
        if (function := re.search(r"Function : (\w+)", line)) is not None:
            current = found.setdefault(function[1], [])
        elif (opcode := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", line)) is not None:
            current.append(opcode[1])
    names = demangled(list(found))
    return {names[name]: opcodes for name, opcodes in found.items()}


def blocks_per_multiprocessor(target: Target, usage: Usage, launch: Launch) -> int:
    """How many blocks fit: registers go out by warp in 256, shared memory with 1 KiB for the system."""
    warps = launch.threads // 32
    registers = -(-usage.registers * 32 // 256) * 256 * warps
    return min(
        target.blocks, target.warps // warps, target.registers // registers, target.shared // (launch.shared + 1024)
    )


def table(program: Path) -> str:
    """Markdown: a row per kernel; registers and resident warps (of the most there are) per target."""
    names = [target.name for target in TARGETS]
    lines = [
        "| kernel | threads | shared memory | registers " + " / ".join(names) + " | warps of a multiprocessor |",
        "|---|---|---|---|---|",
    ]
    for kernel, launch in sorted(launches(program).items()):
        found = [usages()[target.name, kernel] for target in TARGETS]
        warps = [
            f"{blocks_per_multiprocessor(target, usage, launch) * launch.threads // 32} of {target.warps}"
            for target, usage in zip(TARGETS, found, strict=True)
        ]
        registers = " / ".join(str(usage.registers) for usage in found)
        lines.append(f"| `{kernel}` | {launch.threads} | {launch.shared:,} | {registers} | {' / '.join(warps)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as builds:
        print(f"compiler {compiler()}\n\n{table(harness.build('asan', Path(builds)))}")
