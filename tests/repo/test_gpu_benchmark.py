"""benchmarks/gpu.py where there is no GPU: its steps rehearsed, its record, its supervisor, its table, its list."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvkeye import ops
from tests.repo.test_benchmarks import ROOT, run

needs_cpp = pytest.mark.skipif(
    "cpp" not in ops.OPS["packed_linear"].implementations, reason="the C++ kernels are not built"
)


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_a_gpu_it_lists_what_needs_one_and_why(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 3 and "no GPU is visible to torch" in done.stderr
    assert "compute-sanitizer instruments machine code" in done.stdout and "ops with triton: " in done.stdout
    assert done.stdout == run("gpu.py", "--needs") and not (tmp_path / "rows.jsonl").exists()


def test_a_run_of_the_suite_ends_with_the_cells_and_what_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    rows = "test_values and copy_blocks and fp32 and not cpp"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_conformance.py",
        "-k",
        rows,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    heading, cells = (line.split() for line in done.stdout.splitlines() if line.startswith(("op  ", "copy_blocks")))
    assert heading == ["op", "cuda", "eager"] and cells == ["copy_blocks", "0/0/1/0", "1/0/0/0"], done.stdout
    assert "needs a GPU" in done.stdout and "compute-sanitizer instruments machine code" in done.stdout


def test_every_step_has_its_reason(scripts):
    from _gpu_needs import REASONS
    from gpu import STEPS

    assert sorted(REASONS) == sorted(STEPS)


@needs_cpp
def test_it_goes_on_where_it_stopped(tmp_path):
    """A row that passed with this code is not run again; one that failed, or that other code has shown, is."""
    path = tmp_path / "rows.jsonl"
    options = ("--rehearse", "--steps", "conformance", "--json", str(path))
    assert " pass" in run("gpu.py", *options)
    lines = path.read_text().splitlines()
    failed, other, *rest = map(json.loads, lines)
    changed = [*rest, failed | {"status": "fail: planted"}, other | {"code": "another"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    assert "fail" not in run("gpu.py", *options, "--keep")
    assert rows_in(path)[len(lines) :] == [failed] and failed["status"] == "pass"
    run("gpu.py", *options)
    assert rows_in(path)[len(lines) :] == [failed, other]
    assert {"commit", "torch", "triton", "cuda", "driver"} <= set(failed)
    checked = {key.split("/")[1] for key in (row["key"] for row in rows_in(path))}
    assert checked == {op.name for op in ops.OPS.values() if "cpp" in op.implementations}


@needs_cpp
def test_it_rehearses_the_engine_and_what_it_times(tmp_path):
    """tiny-keye, steps, a prompt and encoder passes of a small geometry, tiny attention beside peers."""
    path = tmp_path / "rows.jsonl"
    steps = ("graphs", "bits", "engine", "decode", "prompt", "encode", "attention", "video", "timing")
    output = run("gpu.py", "--rehearse", "--steps", *steps, "--json", str(path))
    found = {row["key"]: row for row in rows_in(path)}
    verdicts = {key: row["status"].partition(":")[0] for key, row in found.items()}
    names = ("waits_per_step", "waits_with_head", "fp8_alone_equals_together")
    assert [verdicts.pop(f"engine/{name}") for name in names] == ["refuse"] * 3
    by_step = {step: {key: v for key, v in verdicts.items() if key.startswith(step)} for step in steps}
    assert set(by_step.pop("graphs").values()) == {"pass", "refuse"}  # FP8 caches have no C++ kernel
    assert all(set(found.values()) == {"pass"} for found in by_step.values()), output
    counts = {step: len(found) for step, found in by_step.items()}
    assert counts.pop("timing") > 30
    assert counts == {"bits": 1, "engine": 6, "decode": 3, "prompt": 1, "encode": 2, "attention": 4, "video": 1}
    for key in (key for key in found if key.startswith(("decode/", "encode/"))):
        assert len(found[key]["sides_ms"]) == 4
    for key in (key for key in found if key.startswith("attention/")):
        assert {"SDPA math", "FlexAttention", "eager"} <= set(found[key]["peers_ms"]), found[key]["left_out"]
    printed = run("gpu.py", "--table", str(path))
    assert all(f"| {key} |" in printed for key, row in found.items() if "ms" in row)


def test_a_package_that_the_engine_lacks_is_named(scripts, monkeypatch):
    import _gpu_engine

    monkeypatch.setattr(_gpu_engine, "PACKAGES", ("torch", "no_such_package"))
    _, check = next(_gpu_engine.engine_checks("cpu"))
    with pytest.raises(AssertionError, match="needs the packages no_such_package"):
        check()


def test_a_peer_that_is_wrong_is_left_out(scripts):
    from _gpu_attention import TINY, arguments_of, own, sdpa, usable
    from torch.nn.attention import SDPBackend

    shape = TINY[0]
    arguments = arguments_of(shape, torch.device("cpu"))
    right = sdpa(SDPBackend.MATH)
    peers = {"right": right, "wrong": lambda s, a: lambda: 2 * right(s, a)(), "cannot": lambda s, a: 1 / 0}
    found, missing = usable(peers, shape, arguments, own(shape, arguments, "eager")())
    assert set(found) == {"right"} and "differs by 0.5" in missing["wrong"] and "ZeroDivision" in missing["cannot"]


#: For processes that begin with it: a driver that says what GPU there is, and starts nothing.
DRIVER = """
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

driver.set_active(Driver())
"""
COMPILE = """
from _gpu_compile import compile_all

if __name__ == "__main__":
    print(compile_all("cpu", 2, [("rms_norm", "bf16"), ("gelu_backward", "fp16")]))
"""


def test_kernels_are_compiled_once_by_processes_side_by_side(tmp_path):
    """As for a launch: another run finds them in Triton's cache."""
    found = importlib.util.find_spec("triton")
    if found is None or not (Path(found.origin).parent / "backends/nvidia/bin/ptxas").is_file():
        pytest.skip("no triton with an assembler for NVIDIA GPUs")
    (tmp_path / "sitecustomize.py").write_text(DRIVER)
    (tmp_path / "script.py").write_text(COMPILE)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{tmp_path}:{ROOT / 'benchmarks'}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    runs = []
    for _ in range(2):
        command = [sys.executable, str(tmp_path / "script.py")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
        assert "launches in" in done.stdout and "with 2 processes" in done.stdout, done.stderr
        runs.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.cubin")})
    assert len(runs[0]) > 5 and runs[0] == runs[1]


#: Rows a, b and c; b does what the first argument says.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from _gpu_record import Record

what, path, seconds = sys.argv[1:]
record = Record(Path(path), "toy")
for key in "abc":
    if record.done(key):
        continue
    record.begin(key)
    if key == "b":
        if what == "hang":
            time.sleep(60)
        if what == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "lose":
            record.add(key, "fail: an illegal address", fatal=True)
            os._exit(5)
    record.add(key, "pass")
"""


@pytest.mark.parametrize(
    ("what", "status"),
    [
        ("hang", "fail: did not end within 2 s"),
        ("crash", "fail: ended its process, status -9"),
        ("lose", "fail: an illegal address"),
        ("work", "pass"),
    ],
)
def test_a_row_that_ends_its_process_does_not_cost_the_others(what, status, scripts, monkeypatch, tmp_path):
    from _gpu_record import Record
    from _gpu_supervisor import supervise

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", CHILD, what, str(path)]
    running = path.with_suffix(".running")
    assert supervise(command, running, lambda why: Record(path, "toy").bury(why), 60, 2) == 0
    assert {row["key"]: row["status"] for row in rows_in(path)} == {"a": "pass", "b": status, "c": "pass"}
    assert len(rows_in(path)) == 3 and not running.exists()


def test_the_clock_stops_a_row_without_a_verdict(scripts, monkeypatch, tmp_path):
    import _gpu_supervisor

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    monkeypatch.setattr(_gpu_supervisor, "GRACE", 0.5)
    path = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", CHILD, "hang", str(path)]
    running = path.with_suffix(".running")
    assert _gpu_supervisor.supervise(command, running, pytest.fail, 4, 60) is None
    assert [row["key"] for row in rows_in(path)] == ["a"] and not running.exists()


def test_goals_are_judged_for_the_card_that_they_were_set_for(scripts):
    from _gpu_table import table

    origin = {"commit": "c", "code": "f", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "driver": "580"}
    row = origin | {"key": "attention/decode 1 x 4096/cuda", "status": "pass", "ms": 0.012, "peers_ms": {"SDPA": 0.03}}
    judged = table([row | {"device": "NVIDIA H200"}])
    assert "**miss**: ms 0.012, at most 0.009" in judged and "SDPA: 0.03 (2.50x)" in judged
    assert "miss" not in table([row | {"device": "NVIDIA H100"}])
    assert "pass: ms 0.008" in table([row | {"device": "NVIDIA H200"}, row | {"device": "NVIDIA H200", "ms": 0.008}])
    assert "- NVIDIA H200: commit c, code f, torch 2.11.0, triton 3.6.0, CUDA 13.0, driver 580." in judged
