"""int8 linear layers against sums of Python integers, bit for bit, on every implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import _library

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("eager", pytest.param("cpp", marks=pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)))  # fmt: skip


def levels(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[M, K] -> int64 levels and fp32 scales, by the rule in the op's contract."""
    numbers = rows.float().numpy()
    largest = np.abs(numbers).max(1, keepdims=True)
    inverse = np.float32(1) / largest * np.float32(127)
    return np.rint(numbers * inverse).astype(np.int64), (largest * np.float32(1 / 127))[:, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (30, 33), (257, 64), (3000, 5)])
def test_sums_are_those_of_integers(inputs: int, outputs: int, dtype: torch.dtype, backend: str) -> None:
    x, weight = torch.randn(29, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    with ops.use_backends(backend):
        packed, scales = ops.quantize_weight(weight, 1)
        y = ops.int8_linear(x, packed, scales, None)
    (x_levels, x_scales), (w_levels, w_scales) = levels(x), levels(weight)
    sums = (x_levels @ w_levels.T).astype(np.float32)
    assert np.array_equal(scales[0].numpy(), w_scales)
    assert torch.equal(y, torch.from_numpy(sums * x_scales[:, None] * w_scales).to(dtype))
    stands_for = w_levels.astype(np.float32) * w_scales[:, None]
    assert np.array_equal(ops.dequantize_weight(packed, scales, inputs).numpy(), stands_for)


@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_sums_do_not_overflow(backend: str) -> None:
    inputs = (2**31 - 1) // (255 * 127)
    x, weight = torch.ones(2, inputs), torch.ones(3, inputs)
    x[1] = weight[1] = -1
    with ops.use_backends(backend):
        y = ops.int8_linear(x, *ops.quantize_weight(weight, 1), None)
        with pytest.raises(ValueError, match="K from 1 to"):
            ops.quantize_weight(torch.ones(1, inputs + 1), 1)
    # 127 x 127 x K levels at 1/127 squared, in fp32
    scale = np.float32(1 / 127)
    expected = float(np.float32(127 * 127 * inputs) * scale * scale)
    assert y.tolist() == [[expected, -expected, expected], [-expected, expected, -expected]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_spoil_only_themselves(dtype: torch.dtype, backend: str) -> None:
    x, weight = torch.randn(4, 40).to(dtype), torch.randn(6, 40).to(dtype)
    x[1, 3], x[2, 39], weight[5, 7] = torch.inf, torch.nan, -torch.inf
    with ops.use_backends(backend):
        packed, scales = ops.quantize_weight(weight, 1)
        y = ops.int8_linear(x, packed, scales, None)
        assert y[1:3].isnan().all() and y[:, 5].isnan().all()
        clean = ops.int8_linear(x[[0, 3]], packed, scales, None)
    assert torch.equal(y[[0, 3], :5], clean[:, :5]) and clean[:, :5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 2), (33, 70), (600, 130)])
def test_bits_depend_on_the_row_alone(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """For one row or many, with its epilogue or as a chain of ops, in C++ or as declared: the same bits."""
    if _library.native("cpp").path is None:
        pytest.skip(f"no C++ library: {_library.native('cpp').reason}")
    weight, bias = torch.randn(outputs, inputs).to(dtype) * 0.3, torch.randn(outputs).to(dtype)
    x, residual = torch.randn(200, inputs + 3).to(dtype)[:, 1 : inputs + 1], torch.randn(200, outputs).to(dtype)
    with ops.use_backends("cpp"):
        quantized, gate_up = ops.quantize_weight(weight, 1), ops.quantize_weight(weight, 2)
        alone = torch.cat([ops.int8_linear(row[None], *quantized, bias) for row in x])
        both = ops.silu_mul(ops.int8_linear(x, *quantized, None))
        for rows in (1, 6, 12, 13, 25, 200):
            y = ops.int8_linear(x[:rows], *quantized, bias)
            assert torch.equal(y, alone[:rows])
            assert torch.equal(ops.int8_linear_add(x[:rows], *quantized, bias, residual[:rows]), residual[:rows] + y)
            assert torch.equal(ops.int8_linear_silu_mul(x[:rows], *gate_up), both[:rows])
    assert torch.equal(alone, ops.int8_linear.reference(x, *quantized, bias))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """This file once more, on each instruction set of this machine."""
    if os.environ.get("KVKEYE_CPU_ISA") or _library.native("cpp").path is None:
        pytest.skip("one instruction set is forced" if os.environ.get("KVKEYE_CPU_ISA") else "no C++ library")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = os.environ | {"KVKEYE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "does not support it" in result.stdout + result.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0, result.stdout[-3000:]
