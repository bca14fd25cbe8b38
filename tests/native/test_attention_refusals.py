"""What the attention, linear and sampling kernels refuse themselves, by name and value."""

from __future__ import annotations

import pytest
import torch

from kvkeye.ops import _library

pytestmark = pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refusals() -> list[tuple[str, tuple[object, ...], str]]:
    q, k, cache = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.randn(3, 1, 4, 8)
    table, one, none = ints(0, 2)[None], torch.ones(2), torch.zeros(2, dtype=torch.int32)
    seeds, logits = torch.zeros(2, dtype=torch.int64), torch.randn(2, 5)

    def varlen(q: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor) -> tuple[object, ...]:
        return q, k, k, bounds, 4, True, 1.0

    def paged(table: torch.Tensor, bounds: torch.Tensor, context: torch.Tensor, mask: object) -> tuple[object, ...]:
        return q, cache, cache, table, bounds, context, mask, 1.0

    def sample(history: torch.Tensor, bounds: torch.Tensor, mask: object = None) -> tuple[object, ...]:
        return (
            logits, one, none, one, one, one, one, one, history, bounds, none, seeds, seeds, seeds, mask,
        )  # fmt: skip

    return [
        ("varlen_attention", varlen(q, k, ints(0, 3)), "cu_seqlens runs from 0 to 3; expected 0 to 4"),
        ("varlen_attention", varlen(q, k, ints(0, 3, 2, 4)), "cu_seqlens[1] = 3 and [2] = 2; expected ascending"),
        ("varlen_attention", varlen(q, k, torch.tensor([0, 4])), "cu_seqlens is Long; expected Int"),
        ("varlen_attention", varlen(q, k[:3], ints(0, 4)), "k has shape [3, 1, 8]; expected [4, 1, 8]"),
        ("varlen_attention", varlen(q[:, :1], k.expand(4, 2, 8), ints(0, 4)), "1 query heads are not a multiple of 2"),
        ("varlen_attention", varlen(q, k.bfloat16(), ints(0, 4)), "k is BFloat16; expected Float"),
        ("varlen_attention", varlen(q.half(), k.half(), ints(0, 4)), "q is Half; the C++ kernels take"),
        (
            "paged_attention",
            paged(ints(0, 3)[None], ints(0, 4), ints(8), None),
            "block_table[0, 1] = 3; expected 0 to 2",
        ),
        ("paged_attention", paged(ints(0, -1)[None], ints(0, 4), ints(8), None), "block_table[0, 1] = -1"),
        ("paged_attention", paged(table, ints(0, 4), ints(9), None), "context_lens[0] = 9; expected 0 to 8"),
        ("paged_attention", paged(table, ints(0, 4), ints(-1), None), "context_lens[0] = -1"),
        ("paged_attention", paged(table, ints(0, 2), ints(8), None), "cu_seqlens_q runs from 0 to 2; expected 0 to 4"),
        ("paged_attention", paged(table, ints(0, 4), ints(8), ints(1, 1, 1, 1)), "tree_mask is Int; expected Long"),
        ("packed_linear", (logits, torch.randn(3, 4), None), "x has shape [2, 5]; expected [..., 4]"),
        ("packed_linear", (logits, torch.randn(3, 5), torch.randn(4)), "bias has shape [4]; expected [3]"),
        ("packed_linear", (logits, torch.randn(3, 5).bfloat16(), None), "weight is BFloat16; expected Float"),
        ("sample", sample(ints(5), ints(0, 1, 1)), "history[0] = 5; expected a token id from 0 to 4"),
        ("sample", sample(ints(1), ints(0, 1, 2)), "cu_history[1] = 1 and [2] = 2; expected ascending values"),
        ("sample", sample(ints(), ints(0, 0)), "cu_history has shape [2]; expected [3]"),
        ("sample", sample(ints(), ints(0, 0, 0), ints(1, 1)), "mask has shape [2]; expected [2, 1]"),
    ]


@pytest.mark.parametrize(("name", "args", "message"), refusals())
def test_refusals(name: str, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.kvkeye_cpu, name)(*args)
    assert message in str(error.value)


def test_a_tree_of_more_than_64_rows() -> None:
    q, cache = torch.randn(65, 1, 8), torch.randn(3, 1, 32, 8)
    bits = torch.zeros(65, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="sequence 0 has 65 rows; with tree_mask at most 64"):
        torch.ops.kvkeye_cpu.paged_attention(q, cache, cache, ints(0, 1, 2)[None], ints(0, 65), ints(65), bits, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(70, 1, 8).to(dtype), torch.randn(70, 1, 8).to(dtype), torch.randn(70, 1, 8).to(dtype)
    for broken in (q, k):
        broken[3] = torch.nan
    o, lse = torch.ops.kvkeye_cpu.varlen_attention(q, k, v, ints(0, 70), 70, True, 1.0)
    assert o[:3].isfinite().all() and lse[:3].isfinite().all()
    assert o[3:].isnan().all() and lse[3:].isnan().all()
