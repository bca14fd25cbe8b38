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


pytestmark = pytest.mark.long
LENGTHS = pytest.mark.parametrize("times", (4, 8))


def measured(rows, arm, times, name):
    """Mean and 95 % interval."""
    return rows[arm, times]["measures"][name]


def against(rows, arm, other, times, name):
    """Mean of the paired differences and its interval."""
    return rows[arm, times]["against"][other][name]


@LENGTHS
def test_every_arm_shows_the_shape_that_was_asked_for(rows, times):
    arms = {arm for arm, own in rows if own == times}
    assert {"direct", "concat", "freenoise", "genl", "videomerge", "anchor", "shifted", "attention", "chunks"} < arms
    for arm in arms:
        assert rows[arm, times]["clips"] == 32
        assert measured(rows, arm, times, "identity")[0] > 0.85 and measured(rows, arm, times, "presence")[0] > 0.98


@LENGTHS
def test_tiles_join_where_clips_in_a_row_jump(rows, times):
    low = measured(rows, "concat", times, "seam_ratio")[1]
    assert measured(rows, "videomerge", times, "seam_ratio")[2] < 1.5 < low
    assert against(rows, "videomerge", "concat", times, "position")[2] < 0


@LENGTHS
def test_tiles_keep_more_of_the_motion_than_one_long_sampling(rows, times):
    assert against(rows, "videomerge", "direct", times, "motion")[1] > 0
    assert against(rows, "videomerge", "direct", times, "velocity")[2] < 0


@LENGTHS
def test_search_follows_the_motion_better_than_plain_rollout(rows, times):
    assert against(rows, "truncated-5x4", "chunks", times, "position")[2] < 0
    cost = measured(rows, "truncated-5x4", times, "passes")[0] / measured(rows, "chunks", times, "passes")[0]
    assert cost == pytest.approx((5 * 4 + 8 - 4) / 8, rel=0.02)


@LENGTHS
def test_moving_tiles_cost_less(rows, times):
    assert measured(rows, "shifted", times, "passes")[0] < 0.7 * measured(rows, "videomerge", times, "passes")[0]
