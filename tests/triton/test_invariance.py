"""A token's bits do not depend on what is computed beside it: batch, packing, chunk, number of programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.compare import assert_close, widen
from kvkeye.triton_kernels.attention import lanes, paged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _triton_only():  # type: ignore[no-untyped-def]
    with ops.use_backends("triton"):
        yield


def test_linear_rows_do_not_depend_on_their_number() -> None:
    x, weight = torch.randn(70, 100, device=DEVICE), torch.randn(40, 100, device=DEVICE)
    whole = ops.packed_linear(x, weight, None)
    for rows in (1, 7, 64):
        assert torch.equal(ops.packed_linear(x[:rows], weight, None), whole[:rows])


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attention_does_not_depend_on_packing(causal: bool) -> None:
    q, k, v = (torch.randn(55, heads, 72, device=DEVICE) for heads in (2, 1, 1))
    lengths = [0, 9, 40, 6]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    o, lse = ops.varlen_attention(q, k, v, bounds.to(DEVICE), 40, causal, 0.1)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:]):
        rows, alone = slice(start, stop), torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE)
        single = ops.varlen_attention(q[rows], k[rows], v[rows], alone, stop - start, causal, 0.1)
        assert torch.equal(single[0], o[rows]) and torch.equal(single[1], lse[rows])


@pytest.fixture(scope="module")
def cache() -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, block table) of one sequence of 1120 tokens in shuffled blocks of 32."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(36, 1, 32, 16, generator=generator).to(DEVICE) for _ in range(2))
    table = torch.randperm(36, generator=generator)[:35].to(torch.int32)[None].to(DEVICE)
    return keys, values, table


def attend(
    q: Tensor, cache: tuple[Tensor, Tensor, Tensor], length: int, tree: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    bounds, context = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, q.shape[0]], [length]))
    result: tuple[Tensor, Tensor] = ops.paged_attention(q, *cache, bounds, context, tree, 0.25)
    return result


def test_paged_attention_over_three_splits(cache: tuple[Tensor, Tensor, Tensor]) -> None:
    q = torch.randn(3, 2, 16, device=DEVICE)
    bounds, context = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 3], [1100]))
    args = (q, *cache, bounds, context, None, 0.25)
    truth, naive = (ops.paged_attention.reference(*a) for a in (widen(args), args))
    for out, near, exact in zip(attend(q, cache, 1100), naive, truth):
        assert_close(out, near, exact, "paged_attention")


def test_paged_attention_is_the_same_decoded_chunked_or_prefilled(cache: tuple[Tensor, Tensor, Tensor]) -> None:
    q = torch.randn(40, 2, 16, device=DEVICE)  # positions 1000 to 1039, across the third split's beginning
    o, lse = attend(q, cache, 1040)
    for first, stop in ((0, 1), (23, 24), (24, 25), (39, 40), (0, 17), (17, 40)):
        chunk = attend(q[first:stop], cache, 1000 + stop)
        assert torch.equal(chunk[0], o[first:stop]) and torch.equal(chunk[1], lse[first:stop])
    chain = torch.tensor([(2 << i) - 1 for i in range(40)], device=DEVICE)  # every row sees those before it
    verified = attend(q, cache, 1040, chain)
    assert torch.equal(verified[0], o) and torch.equal(verified[1], lse)


def test_paged_attention_is_the_same_for_any_number_of_workers(
    cache: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.randn(2, 2, 16, device=DEVICE)
    results = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(paged, "split_workers", lambda *_, n=workers: n)
        results.append(attend(q, cache, 1100))
    for o, lse in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(lse, results[0][1])


def test_workers_share_splits_only_where_parts_fit() -> None:
    assert paged.split_workers(8, 64, 32) == 64
    assert paged.split_workers(300, 64, 32) == 2
    assert paged.split_workers(4096, 64, 32) == 1
    assert paged.split_workers(8, 64, 1 << 20) == 1
    assert paged.split_workers(8, 0, 32) == 1


SPLITS = {
    8: (16, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 112: (128, 0), 128: (128, 0), 160: (128, 32),
}  # fmt: skip


@pytest.mark.parametrize(("dim", "split"), SPLITS.items())
def test_head_size_is_covered_by_two_powers_of_two(dim: int, split: tuple[int, int]) -> None:
    assert lanes.split_lanes(dim) == split
    assert dim <= sum(split)
