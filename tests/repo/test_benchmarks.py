"""The benchmark scripts still run, on shapes so small that their figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvkeye import ops

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *options: str) -> str:
    # Announced tiles that do not work kill torch's own bf16 product; the script would spend seconds to find out.
    env = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", **os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif("cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built")
def test_linear_layers_agree_with_onednn_at_both_of_its_settings(tmp_path):
    run("linear.py", "--quick", "--threads", "1", "--rows", "1152x3456", "--json", str(tmp_path / "rows.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [len(row["peers_ms"]) for row in written] == [2, 2]


@pytest.mark.skipif("cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built")
def test_every_row_of_the_vision_benchmark_agrees_with_its_peers(tmp_path):
    rows = ["pack_bicubic", "pack_bilinear", "attention_5476", "tower_448"]
    output = run("vision.py", "--quick", "--threads", "1", "--rows", *rows, "--json", str(tmp_path / "rows.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(written) == len(rows) and all(row["ms"] > 0 and row["peers_ms"] and row["quick"] for row in written)
    assert "limits with 1 threads" in output


@pytest.mark.skipif("cpp" not in ops.OPS["paged_attention"].implementations, reason="the C++ kernels are not built")
def test_every_row_of_the_attention_benchmark_agrees_with_its_peers(tmp_path):
    rows = tmp_path / "rows.jsonl"
    run("attention.py", "--quick", "--threads", "1", "--json", str(rows))
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == 11 and all(row["ms"] > 0 and row["peers_ms"] for row in written)
    assert "| decoding: 1 x 64 tokens of context, 32/8 heads of 128, bf16 |" in run("table.py", str(rows))


@pytest.mark.skipif("cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built")
def test_every_row_of_the_video_benchmark_agrees_with_its_peers(tmp_path):
    run("video.py", "--quick", "--threads", "1", "--json", str(tmp_path / "rows.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(written) == 6 and all(row["ms"] > 0 and row["peers_ms"] for row in written)


@pytest.mark.skipif("cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built")
def test_the_engine_benchmark_makes_equal_tokens_on_both_sides_and_its_table_can_be_printed(tmp_path):
    rows = tmp_path / "rows.jsonl"
    sides = ["--sides", "transformers-fp32", "--rows", "decode_1", "prefill"]
    output = run(
        "engine.py", "--quick", "--threads", "1", *sides, "--folder", str(tmp_path / "model"), "--json", str(rows)
    )
    assert "tokens equal those of transformers" in output
    assert len(rows.read_text().splitlines()) == 2
    assert "| tiny: prompt of 32 tokens |" in run("table.py", str(rows))


@pytest.mark.skipif("cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built")
def test_the_speculation_benchmark_compares_equal_answers(tmp_path):
    rows = tmp_path / "rows.jsonl"
    names = ["--rows", "verify", "fresh", "head", "lookup", "assisted"]
    output = run(
        "speculation.py", "--quick", "--threads", "1", *names, "--folder", str(tmp_path / "model"), "--json", str(rows)
    )
    assert output.count("128 of 128 tokens equal") == 2
    assert len(rows.read_text().splitlines()) == 6


@pytest.mark.skipif(not (ROOT / "kvkeye/assets/tiny-t2v").is_dir(), reason="no bundled video pipelines yet")
def test_the_quality_table_is_made_of_measured_rows(tmp_path):
    rows = tmp_path / "rows.jsonl"
    small = ("--prompts", "1", "--seeds", "2", "--times", "2", "--processes", "1")
    run("quality.py", "--arms", "concat", "videomerge", "chunks", *small, "--json", str(rows))
    written = {row["arm"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert all(row["clips"] == 2 and row["measures"]["presence"][0] > 0 for row in written.values())
    assert written["videomerge"]["measures"]["passes"][0] > written["concat"]["measures"]["passes"][0] > 1
    assert set(written["videomerge"]["against"]) == {"concat"} and written["chunks"]["against"] == {}
    output = run("quality.py", "--table", str(rows))
    assert "Text to video, 2 times the training length, 2 clips each" in output and "| videomerge - concat |" in output
