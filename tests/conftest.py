"""Shared set-up: seeds, Triton's interpreter where there is no GPU, and the table of op rows at the end."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, hence before any import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
    terminalreporter.section("op rows: passed / refused / failed")
    terminalreporter.write_line(f"{'op':<32}" + "".join(f"{c:>16}" for c in columns))
    for op in sorted({op for op, _ in _CELLS}):
        counts = [_CELLS.get((op, c), Counter()) for c in columns]
        cells = [f"{c['passed']}/{c['refused']}/{c['failed']}" if c else "-" for c in counts]
        terminalreporter.write_line(f"{op:<32}" + "".join(f"{c:>16}" for c in cells))
