"""compute-sanitizer over the small rows of the `cuda` kernels: benchmarks/gpu.py runs itself under it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

#: What finds addresses outside a buffer, unordered shared memory, and barriers that some threads miss.
TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 60


def sanitized() -> Iterator[tuple[str, Callable[[], str]]]:
    """(key, check) of each tool."""
    for tool in TOOLS:
        yield f"sanitizer/{tool}", lambda t=tool: _run(t)


def _run(tool: str) -> str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "refuse: compute-sanitizer is not on the path"
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        checks = ["--steps", "conformance", "--only", "/cuda/bf16/", "--seconds", str(SECONDS), "--json", str(rows)]
        command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable]
        command += [str(Path(__file__).parent / "gpu.py"), "--worker", *checks]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * SECONDS)
        count = len(rows.read_text().splitlines()) if rows.exists() else 0
    assert done.returncode in (0, 4), f"{tool}: exit code {done.returncode}; {(done.stdout + done.stderr)[-1500:]}"
    assert count, f"{tool}: no row was reached in {SECONDS} s"
    return "pass" if done.returncode == 0 else f"pass: the first {count} rows, then time ran out"
