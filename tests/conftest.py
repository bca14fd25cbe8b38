"""Shared set-up: seeds, Triton's interpreter where there is no GPU, and at the end op rows and what needs a GPU."""

from __future__ import annotations

import os
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, hence before any import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

VERDICTS = ("passed", "refused", "skipped", "failed")
_CELLS: dict[tuple[str, str], Counter[str]] = {}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    cell = dict(report.user_properties).get("cell")
    if cell is None or report.when != "call":
        return
    op, implementation = str(cell).split("/")
    outcome = dict(report.user_properties).get("outcome", report.outcome)
    _CELLS.setdefault((op, implementation), Counter())[str(outcome)] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _CELLS:
        return
    columns = sorted({implementation for _, implementation in _CELLS})
    terminalreporter.section("op rows: passed / refused / skipped / failed")
    terminalreporter.write_line(f"{'op':<32}" + "".join(f"{c:>16}" for c in columns))
    for op in sorted({op for op, _ in _CELLS}):
        counts = [_CELLS.get((op, c), Counter()) for c in columns]
        cells = ["/".join(str(c[verdict]) for verdict in VERDICTS) if c else "-" for c in counts]
        terminalreporter.write_line(f"{op:<32}" + "".join(f"{c:>16}" for c in cells))
    if not torch.cuda.is_available():
        terminalreporter.section("needs a GPU (python benchmarks/gpu.py)")
        script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "_gpu_needs.py"))
        terminalreporter.write_line(script["needs"](("cuda", "triton")))
