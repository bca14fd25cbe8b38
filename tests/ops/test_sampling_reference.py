"""The C++ sampler, which never sorts the vocabulary, draws what the reference draws by sorting it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import _library

pytestmark = pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)

ROWS = 6


def logits_of(kind: str, vocabulary: int) -> Tensor:
    x = 4 * torch.randn(ROWS, vocabulary)
    if kind == "ties":
        return x.round()
    if kind == "flat":
        return torch.zeros(ROWS, vocabulary)
    if kind == "holes":
        x[:, ::3] = -torch.inf
    if kind == "broken" and vocabulary > 2:
        x[0, 0], x[2, -1] = torch.nan, torch.inf
        x[1] = -torch.inf
    return x


def arguments(kind: str, vocabulary: int, dtype: torch.dtype) -> list[Tensor | None]:
    lengths = torch.randint(0, 20, (ROWS,))
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    top_k = torch.tensor([0, 1, 3, vocabulary, 50, 0]) if kind != "flat" else torch.zeros(ROWS)
    return [
        logits_of(kind, vocabulary).to(dtype),
        torch.tensor([0.0, 0.5, 1.0, 1.3, 0.01, 2.0]),
        top_k.int(),
        torch.tensor([1.0, 0.5, 1.0, 0.25, 0.9, 0.95]),  # exact shares of a flat row among them
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.5, 0.01]),
        torch.tensor([1.0, 1.2, 0.8, 1.0, 1.0, 1.1]),
        torch.tensor([0.0, 0.5, 0.0, 0.0, 1.0, -0.3]),
        torch.tensor([0.0, 0.0, 0.2, 0.0, 0.1, 0.3]),
        torch.randint(0, vocabulary, (int(bounds[-1]),)).int(),
        bounds,
        torch.randint(0, 12, (ROWS,)).int(),
        torch.randint(-(2**62), 2**62, (ROWS,)),
        torch.randint(0, 2**40, (ROWS,)),
        torch.randint(0, 5, (ROWS,)),
        torch.randint(-(2**31), 2**31, (ROWS, -(-vocabulary // 32))).int() if kind == "masked" else None,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 97, 1000, 5000])
@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "holes", "broken", "masked"])
def test_equals_the_reference(kind: str, vocabulary: int, dtype: torch.dtype) -> None:
    for _ in range(3):
        given = arguments(kind, vocabulary, dtype)
        with ops.use_backends("eager"):
            expected = ops.sample(*given)
        with ops.use_backends("cpp"):
            assert torch.equal(ops.sample(*given), expected)


def _misleading(vocabulary: int) -> Tensor:
    """Rows whose every other block of 64 holds next to nothing, and whose large logits stand together."""
    x = torch.randn(ROWS, vocabulary).sort(-1).values
    x[:, torch.arange(vocabulary) // 64 % 2 == 0] -= 20
    return x


@pytest.mark.parametrize("kind", ["spread", "near", "misleading"])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.5), (0, 0.9), (0, 0.999), (20, 1.0), (1000, 0.8)])
def test_equals_the_reference_on_a_full_vocabulary(top_k: int, top_p: float, kind: str) -> None:
    given = arguments("spread", 151_936, torch.float32)
    if kind == "near":
        given[0] = given[0] / 4  # type: ignore[operator]
    if kind == "misleading":
        given[0] = _misleading(151_936)
    given[1], given[2], given[3] = (
        torch.full((ROWS,), 1.2),
        torch.full((ROWS,), top_k).int(),
        torch.full((ROWS,), top_p),
    )
    with ops.use_backends("eager"):
        expected = ops.sample(*given)
    with ops.use_backends("cpp"):
        assert torch.equal(ops.sample(*given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.5, 0.0), (0.9, 0.2), (1.0, 0.2)])
def test_equals_the_reference_where_fp32_sums_would_not(top_p: float, min_p: float, dtype: torch.dtype) -> None:
    """Nearly flat rows: neighbours in the cumulated mass are so close that fp64 has to decide some of the draws."""
    rows = 48
    given = [torch.zeros(rows, dtype=None if t is None else t.dtype) for t in arguments("spread", 1, dtype)]
    given[0] = torch.randn(rows, 151_936).div(2).to(dtype)
    given[1], given[3], given[4] = torch.ones(rows), torch.full((rows,), top_p), torch.full((rows,), min_p)
    given[5], given[8], given[9] = torch.ones(rows), torch.empty(0).int(), torch.zeros(rows + 1).int()
    given[12] = torch.arange(rows)
    with ops.use_backends("eager"):
        expected = ops.sample(*given[:14], None)
    with ops.use_backends("cpp"):
        assert torch.equal(ops.sample(*given[:14], None), expected)


def test_an_infinite_temperature_with_a_mask_stays_inside_the_mask() -> None:
    given = arguments("spread", 64, torch.float32)
    given[1], given[2], given[3] = torch.full((ROWS,), torch.inf), torch.zeros(ROWS).int(), torch.full((ROWS,), 0.9)
    given[4] = torch.zeros(ROWS)
    given[14] = torch.tensor([[0x0F0F, 0]] * ROWS).int()
    with ops.use_backends("cpp"):
        tokens = ops.sample(*given)
    assert all(0x0F0F >> int(token) & 1 for token in tokens)


def test_not_a_number_as_temperature_draws_nothing() -> None:
    given = arguments("spread", 64, torch.float32)
    given[1] = torch.full((ROWS,), torch.nan)
    with ops.use_backends("cpp"):
        assert ops.sample(*given).tolist() == [-1] * ROWS
