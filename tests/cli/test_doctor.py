"""`kvkeye doctor`: what it finds is what is there; trouble changes the verdict and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kvkeye import host, ops
from kvkeye.cli import bundled, checks
from kvkeye.engine.backends import SERVING_OPS
from kvkeye.ops import _library


@pytest.fixture
def doctor(call):
    def run():
        done = call("doctor", "--json")
        report = json.loads(done.out)
        return done.code, report["verdict"], {check["name"]: check for check in report["checks"]}

    return run


def test_facts_of_this_machine(doctor):
    code, verdict, found = doctor()
    assert (code, verdict) == (0, max((c["status"] for c in found.values()), key=["PASS", "WARN", "FAIL"].index))
    assert found["torch"]["value"].startswith(torch.__version__)
    assert found["host structures"]["value"].startswith(host.IMPLEMENTATION)
    reason = _library.native("cpp").reason
    assert (found["C++ kernels"]["status"] == "PASS") == (reason is None)
    if reason is None:
        assert found["C++ kernels"]["value"].split()[0] in ("generic", "avx2", "avx512", "amx")
        assert "cpp" in found["kernels run"]["value"]


def test_what_a_gpu_would_run_is_listed_op_by_op(doctor):
    found = doctor()[2]
    chosen = {op: found[f"GPU {op}"]["value"].removeprefix("would run ") for op in SERVING_OPS}
    first = {op: value.split()[0].rstrip(";") for op, value in chosen.items()}
    assert {first[op] for op in ("copy_blocks", "paged_attention", "qk_norm_mrope_append", "sample")} == {"cuda"}
    assert first["rms_norm"] == "triton" and "cuda: not written" in chosen["rms_norm"]
    assert chosen["packed_linear"].startswith("cuda; triton if invariant (cuda: cuBLAS chooses")
    assert found["GPU draft_tree"]["value"].removeprefix("would run ").startswith("eager (for a draft head: the ops")
    kernels = {op for op in SERVING_OPS if {"cuda", "triton"} & set(ops.OPS[op].implementations)}
    assert {op for op, name in first.items() if name == "eager"} == set(SERVING_OPS) - kernels


def test_an_op_that_falls_to_its_reference_on_a_gpu_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(_library, "native_reason", lambda name, op: "it was not built" if op == "sample" else None)
    found = {check.name: check for check in checks.gpu_ops()}
    assert found["GPU sample"].status == "WARN"
    assert found["GPU sample"].value == "eager (cuda: it was not built; triton: not written)"
    assert found["GPU copy_blocks"] == checks.Check("GPU copy_blocks", "PASS", "cuda")


def test_fp8_caches_are_named_with_their_kernels_or_refused(monkeypatch):
    kernels = "paged_attention cuda, qk_norm_mrope_append cuda"
    [found] = checks.fp8_caches()
    if not torch.cuda.is_available():
        assert found == checks.Check("GPU FP8 caches", "PASS", f"would be in bfloat16: {kernels}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(_library, "native_reason", lambda name, op: None)
    monkeypatch.setattr(_library, "triton_reason", lambda: None)
    assert checks.fp8_caches()[0].value == f"in bfloat16: {kernels}"
    monkeypatch.setattr(_library, "native_reason", lambda name, op: "it was not built")
    sentence = "refused: paged_attention runs on triton, which does not take them (cuda: it was not built)"
    assert checks.fp8_caches()[0].value == sentence


def test_text_ends_with_the_verdict(call):
    done = call("doctor")
    assert done.code == 0 and done.out.splitlines()[-1] in ("PASS", "WARN")
    assert "torch" in done.out and "bundled model" in done.out


def test_absent_bundled_model_warns_with_the_recipe(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "ASSETS", tmp_path)
    code, verdict, found = doctor()
    assert (code, verdict) == (0, "WARN") and "kvkeye train sft.toml" in found["bundled model"]["advice"]


def test_damaged_bundled_model_fails(doctor, monkeypatch, tmp_path):
    (tmp_path / bundled.DEFAULT_MODEL).mkdir()
    monkeypatch.setattr(checks, "ASSETS", tmp_path)
    code, verdict, found = doctor()
    assert (code, verdict) == (3, "FAIL") and "config.json" in found["bundled model"]["value"]


def test_sound_bundled_model_passes(doctor, monkeypatch, model, tmp_path):
    (tmp_path / bundled.DEFAULT_MODEL).symlink_to(model)
    monkeypatch.setattr(checks, "ASSETS", tmp_path)
    assert doctor()[2]["bundled model"]["status"] == "PASS"


def test_variable_that_does_not_exist_warns(doctor, monkeypatch):
    monkeypatch.setenv("KVKEYE_BACKEND", "cpp")
    _, verdict, found = doctor()
    assert verdict == "WARN" and found["KVKEYE_BACKEND"]["status"] == "WARN"
    assert "KVKEYE_BACKENDS" in found["KVKEYE_BACKEND"]["advice"]


def test_variables_in_effect_are_listed(doctor, monkeypatch):
    monkeypatch.setenv("KVKEYE_BACKENDS", "cpp,eager")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = doctor()[2]
    assert found["KVKEYE_BACKENDS"]["value"] == "cpp,eager" and found["OMP_NUM_THREADS"]["value"] == "1"


def test_malformed_order_of_backends_fails(doctor, monkeypatch):
    monkeypatch.setenv("KVKEYE_BACKENDS", "vulkan")
    code, verdict, found = doctor()
    assert (code, verdict) == (3, "FAIL") and "vulkan" in found["KVKEYE_BACKENDS"]["value"]


@pytest.mark.skipif(_library.native("cpp").reason is not None, reason="the C++ library is not built here")
@pytest.mark.parametrize(("asked", "status"), [("generic", "PASS"), ("avx1024", "FAIL")])
def test_forced_instruction_set(spawn, asked, status):
    done = spawn("doctor", "--json", KVKEYE_CPU_ISA=asked)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["C++ kernels"]["status"] == status and asked in found["C++ kernels"]["value"]
    assert done.returncode == (0 if status == "PASS" else 3)


def test_wrong_kernel_is_found(doctor, monkeypatch):
    implementation = ops.OPS["rms_norm"].implementations["cpp"]
    if implementation.absent():
        pytest.skip("no C++ kernel to spoil: the library is not built here")
    monkeypatch.setitem(vars(implementation), "call", lambda x, weight, eps: torch.zeros_like(x))
    code, verdict, found = doctor()
    assert (code, verdict) == (3, "FAIL") and "rms_norm of cpp" in found["kernels run"]["value"]


def test_without_torch():
    code = "import sys; sys.modules['torch'] = None; from kvkeye.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout.splitlines()[-1] == "FAIL"
    assert "pip install 'torch" in done.stdout and "Traceback" not in done.stderr
