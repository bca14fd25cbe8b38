"""What the methods of long video do to clips, on the bundled models whose right continuation is known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"
HOUR = 3600.0


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The whole table, by arm and length: 8 prompts, 4 seeds."""
    file, begin = tmp_path_factory.mktemp("quality") / "rows.jsonl", time.monotonic()
    subprocess.run([sys.executable, str(SCRIPT), "--json", str(file)], check=True, timeout=HOUR)
    assert time.monotonic() - begin < HOUR
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return {(row["arm"], row["times"]): row for row in found}
