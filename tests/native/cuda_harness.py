"""The CUDA sources built by the host compiler, and calls of them in a process of their own.

`build("asan", ...)` finds wrong addresses and undefined arithmetic, `build("races", ...)` unordered accesses. The
waiting statements of the kernels, and expressions of them that a test names, carry a switch: `run(..., without=name)`
leaves one out, `plants` puts a wrong expression in its place, and one build serves all mutants. Knows files and
processes; the meaning of CUDA is in csrc/host_cuda, the calls by name in tests/native/cuda.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
CALLS = ROOT / "tests" / "native" / "cuda"
CUDA = ROOT / "csrc" / "cuda"
HOST = [*sorted((ROOT / "csrc" / "host_cuda").glob("*.cpp")), CALLS / "main.cpp"]
KERNELS = [*sorted(CUDA.glob("*.cu")), *sorted(CALLS.glob("*_calls.cpp"))]
FAULT = 70  # exit status of a fault that the harness found; the sanitizers have their own

COMMON = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
# Strict: an array that ends a struct is no longer than it says.
SANITIZE = ["-fsanitize=address,undefined,bounds-strict", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# Flags of all files, and more for the kernels alone: the race checker must not watch itself.
HOST_DEFINES = {"KVKEYE_UCONTEXT"}
FLAVOURS = {"asan": (SANITIZE, []), "races": (["-DKVKEYE_RACES"], ["-fsanitize=thread"])}
# Statements that make a thread wait, or others see what it did.
STATEMENTS = re.compile(
    r"^\s*((?:__syncthreads|__syncwarp|__threadfence|commit_copies|wait_copies<\d+>|wait)\(\);)", re.MULTILINE
)
# Barriers with a value: left out by the harness itself, they give it and order nothing.
VALUES = re.compile(r"(__syncthreads_(?:count|or|and)\()")


@dataclass(frozen=True)
class Plant:
    """A fault: `wrong` in the place of the expression `right`, which stands once in csrc/cuda/`file`."""

    file: str
    right: str
    wrong: str
    name: str

    @property
    def switch(self) -> str:
        return f"{self.file} {self.name}"


def waits(path: Path) -> list[str]:
    """The waits of a source file by name, "file:line", in order."""
    text = path.read_text()
    found = [m.start(1) for pattern in (STATEMENTS, VALUES) for m in pattern.finditer(text)]
    return [f"{path.name}:{text.count(chr(10), 0, place) + 1}" for place in sorted(found)]


def is_redundant(wait: str) -> bool:
    """Whether the line says, with the reason, that other waits make this one unnecessary."""
    name, _, line = wait.partition(":")
    return "// redundant: " in (CUDA / name).read_text().splitlines()[int(line) - 1]


def build(
    flavour: str,
    folder: Path,
    sources: Sequence[Path] = KERNELS,
    defines: Sequence[str] = (),
    plants: Sequence[Plant] = (),
) -> Path:
    """The program of `sources` and the host part. Built at most once per folder, also when several processes ask."""
    folder.mkdir(parents=True, exist_ok=True)
    everywhere, _ = FLAVOURS[flavour]
    program = folder / _name(flavour, *map(str, sources), *defines, *map(str, plants))
    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            kernels = _with_switches(folder, plants)
            moved = [kernels / path.name if path.parent == CUDA else path for path in sources]
            objects = list(pool.map(lambda path: _object(flavour, folder, path, kernels, defines), [*HOST, *moved]))
            _run([str(COMPILER), *everywhere, *objects, "-o", str(program)])
    return program


def _with_switches(folder: Path, plants: Sequence[Plant]) -> Path:
    """A copy of csrc/cuda in which waits and plants ask whether they were named; the lines stay."""
    target = folder / _name("switches", *map(str, plants))
    target.mkdir(exist_ok=True)
    for path in sorted(CUDA.iterdir()):
        if path.suffix not in (".cu", ".h") or (target / path.name).exists():
            continue
        lines = path.read_text().splitlines()
        for wait in waits(path):
            line = int(wait.partition(":")[2]) - 1
            if VALUES.search(lines[line]):
                continue
            statement = lines[line].partition(";")[0].strip() + ";"
            asked = f'kvkeye::host_cuda::left_out("{wait}") ? (void)0 : {statement}'
            lines[line] = lines[line].replace(statement, asked)
        text = "\n".join(lines) + "\n"
        for plant in plants:
            if plant.file == path.name:
                assert text.count(plant.right) == 1, f"{plant.right} is {text.count(plant.right)} times in {plant.file}"
                asked = f'(kvkeye::host_cuda::left_out("{plant.switch}") ? ({plant.wrong}) : ({plant.right}))'
                text = text.replace(plant.right, asked)
        (target / path.name).write_text(text)
    return target


def _object(flavour: str, folder: Path, source: Path, kernels: Path, defines: Sequence[str]) -> str:
    everywhere, in_kernels = FLAVOURS[flavour]
    flags = [*COMMON, *everywhere, *(in_kernels if source.suffix == ".cu" else [])]
    if source.suffix == ".cu" or HOST_DEFINES.intersection(defines):
        flags += [f"-D{define}" for define in defines]
    target = folder / f"{_name(flavour, str(source), *flags)}.o"
    if not target.exists():
        folders = [*(ROOT / "csrc" / name for name in ("host_cuda", "include", "torch")), kernels, CALLS]
        includes = [f"-I{path}" for path in folders]
        _run([str(COMPILER), *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(target)])
    return str(target)


def _name(flavour: str, *parts: str) -> str:
    return f"{flavour.strip('-')}_{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr


@dataclass
class Call:
    """One call by name, with its numbers and buffers. `run` brings the buffers back as the kernel left them."""

    name: str
    numbers: Mapping[str, int]
    buffers: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "numbers").write_text("".join(f"{name} {value}\n" for name, value in self.numbers.items()))
        for name, tensor in self.buffers.items():
            (folder / name).write_bytes(as_bytes(tensor))

    def read(self, folder: Path) -> dict[str, Tensor]:
        found = {}
        for name, tensor in self.buffers.items():
            content = numpy.fromfile(folder / name, dtype=numpy.uint8)
            found[name] = torch.from_numpy(content).view(tensor.dtype).view(tensor.shape) if len(content) else tensor
        return found


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def execute(
    program: Path, seed: int, calls: list[Call], folder: Path, without: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the calls in one process; they lie in folder/0, folder/1, ... `without` names a wait or a plant."""
    words: list[str] = []
    for i, call in enumerate(calls):
        call.write(folder / str(i))
        words += [call.name, str(folder / str(i))]
    environment = {**os.environ, "KVKEYE_WITHOUT": without}
    command = [str(program), str(seed), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def complaint(program: Path, calls: list[Call], folder: Path, without: str) -> str:
    """What the first call says that sees the mutant, "" if none does."""
    for i, call in enumerate(calls):
        result = execute(program, 1, [call], folder / str(i), without)
        if result.returncode != 0:
            return result.stderr
    return ""


def check_wait(races: Path, calls: list[Call], folder: Path, wait: str) -> None:
    """Asserts that some call sees the wait left out; that none does where its line calls it redundant."""
    said = complaint(races, calls, folder, wait)
    if is_redundant(wait):
        assert not said, f"{wait} is not redundant: {said[:600]}"
    else:
        assert "data race in" in said or "while an asynchronous copy to it is on its way" in said, said or "unseen"


def check_races(races: Path, seed: int, calls: list[Call], folder: Path) -> None:
    """Asserts that no two threads meet at a place without a wait between them, in the order of `seed`."""
    result = execute(races, seed, calls, folder)
    assert result.returncode == 0 and "data race" not in result.stderr, result.stderr[:4000]


def check_plant(asan: Path, calls: list[Call], folder: Path, plant: Plant) -> None:
    """Asserts that some call sees the overrun."""
    said = complaint(asan, calls, folder, plant.switch)
    assert "heap-buffer-overflow" in said or "out of bounds" in said, said[:600] or "unseen"


def run(program: Path, seed: int, calls: list[Call], folder: Path) -> list[dict[str, Tensor]]:
    """The buffers of each call after it; an assertion if anything was found."""
    result = execute(program, seed, calls, folder)
    assert result.returncode == 0, f"status {result.returncode}\n{result.stderr[:4000]}"
    return [call.read(folder / str(i)) for i, call in enumerate(calls)]
