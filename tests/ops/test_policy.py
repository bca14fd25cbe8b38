"""Choice of an implementation: precedence, exactness, sentences."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvkeye import ops
from kvkeye.errors import ConfigError, UnsupportedError
from kvkeye.ops import _library, _policy
from kvkeye.utils import philox

X, WEIGHT = torch.ones(2, 8), torch.ones(8)


def test_default_order_on_the_cpu() -> None:
    assert _policy.order("norm", "rms_norm", "cpu").names == ("cpp", "eager")


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVKEYE_BACKENDS", "norm=eager;*=cpp,eager")
    assert _policy.order("norm", "rms_norm", "cpu") == _policy.Order(("eager",), "KVKEYE_BACKENDS")
    assert _policy.order("rope", "mrope", "cpu").names == ("cpp", "eager")
    with ops.use_backends("rms_norm=cpp;norm=eager"):
        assert _policy.order("norm", "rms_norm", "cpu") == _policy.Order(("cpp",), "use_backends")
        assert _policy.order("norm", "layer_norm", "cpu").names == ("eager",)
        assert _policy.order("rope", "mrope", "cpu").source == "KVKEYE_BACKENDS"


@pytest.mark.parametrize("text", ["native", "cpp,", "norm=", "cpp;rope=fast"])
def test_unknown_names_are_refused(text: str) -> None:
    if text == "cpp,":
        assert _policy.parse(text) == {"*": ("cpp",)}
        return
    with pytest.raises(ConfigError, match="known: eager, cpp, cuda, triton"), ops.use_backends(text):
        pass


def test_settled_calls_run_what_the_first_one_chose() -> None:
    choices: ops.Choices = {}
    expected = ops.rms_norm(X, WEIGHT, 1e-6)
    with torch.inference_mode():
        for specification in ("", "eager", "cpp,eager"):
            for _ in range(2):
                with ops.settle(choices, specification):
                    assert torch.allclose(ops.rms_norm(X, WEIGHT, 1e-6), expected)
    has_cpp = _library.native("cpp").path is not None
    assert [list(kernels) for kernels in choices.values()] == [["rms_norm"] * has_cpp, [], ["rms_norm"] * has_cpp]


def test_a_settled_block_ends_where_another_order_is_asked_for() -> None:
    with ops.settle({}), torch.inference_mode():
        ops.rms_norm(X, WEIGHT, 1e-6)
        with ops.use_backends("cuda"), pytest.raises(UnsupportedError):
            ops.rms_norm(X, WEIGHT, 1e-6)


def test_one_name_is_exact() -> None:
    with ops.use_backends("cuda"), pytest.raises(UnsupportedError) as caught:
        ops.append_kv(
            torch.ones(1, 1, 8), torch.ones(1, 1, 8), torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), torch.tensor([0])
        )
    assert "cuda" in str(caught.value) and "refuses" in str(caught.value)


def test_a_missing_implementation_is_named() -> None:
    with ops.use_backends("triton"), pytest.raises(UnsupportedError, match="sample has no triton implementation"):
        ops.sample.explain()
        ops.sample(*_sample_arguments())


def _sample_arguments() -> tuple[torch.Tensor | None, ...]:
    from kvkeye.testing.case import Sample, good

    return good("sample", Sample(torch.float32))[0].args


def test_explain_gives_reasons_and_the_choice() -> None:
    with ops.use_backends("cuda,eager"):
        text = ops.rms_norm.explain(X, WEIGHT, 1e-6)
    assert "cuda    refuses: rms_norm has no cuda implementation" in text
    assert "eager   runs" in text and "from use_backends" in text


def test_float64_falls_to_the_reference() -> None:
    name, _ = ops.rms_norm.select(X.double(), WEIGHT.double(), 1e-6)
    assert name == "eager"


def test_support_table_as_a_command() -> None:
    table = subprocess.run([sys.executable, "-m", "kvkeye.ops"], capture_output=True, text=True, check=True).stdout
    assert all(op in table for op in ("rms_norm", "paged_attention", "sample"))
    assert not any(line.split()[0].endswith("_backward") for line in table.splitlines() if ":" not in line)
    one = subprocess.run([sys.executable, "-m", "kvkeye.ops", "mrope"], capture_output=True, text=True, check=True)
    assert "sectioned" in one.stdout.lower() and "order:" in one.stdout
    wrong = subprocess.run([sys.executable, "-m", "kvkeye.ops", "nope"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no op 'nope'" in wrong.stderr


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:  # type: ignore[no-untyped-def]
    """The generator's published vectors."""
    assert philox.philox4x32(counter, key) == expected


def test_the_first_choice_per_op_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    _policy._noted.discard(("silu_mul", "eager"))
    with caplog.at_level("DEBUG", logger="kvkeye.ops"), ops.use_backends("eager"):
        ops.silu_mul(X)
        ops.silu_mul(X)
    assert [r.message for r in caplog.records] == ["silu_mul runs eager"]
