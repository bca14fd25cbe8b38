"""The bit rule of `cpp`: a token's result does not depend on what is computed beside it.

Rows alone, in batches, in chunks, in blocks of any size and on any number of threads give the same bits, and a
packed sequence gives those of the paged cache. Run once per instruction set of this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import _library

DTYPES = (torch.float32, torch.bfloat16)

pytestmark = pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    with ops.use_backends("cpp"):
        yield


def same(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found, expected) and bool(torch.isfinite(found).all())


# Linear layers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (31, 33), (72, 5), (100, 70), (1024, 9), (12_000, 5)])
def test_linear_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((29, inputs + 3), (outputs, inputs), (outputs,)))
    x = x[:, 1 : inputs + 1]  # neither aligned nor contiguous
    alone = torch.cat([ops.packed_linear(row[None], weight, bias) for row in x])
    for rows in (1, 2, 3, 5, 6, 7, 8, 13, 29):
        assert same(ops.packed_linear(x[:rows], weight, bias), alone[:rows])
        assert same(ops.packed_linear(x[-rows:].contiguous(), weight, bias), alone[-rows:])
    columns = torch.cat([ops.packed_linear(x, weight[o : o + 1], bias[o : o + 1]) for o in range(outputs)], 1)
    assert same(columns, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_row_blocks(dtype: torch.dtype) -> None:
    x, weight = torch.randn(500, 64).to(dtype), torch.randn(40, 64).to(dtype)
    together = ops.packed_linear(x, weight, None)
    assert all(same(ops.packed_linear(x[i : i + 1], weight, None), together[i : i + 1]) for i in range(0, 500, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 2), (33, 70), (300, 130), (1024, 64)])
def test_linear_forms(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Packed or plain, with its epilogue or as a chain of ops, for one row or many: the same bits."""
    weight, bias = torch.randn(outputs, inputs).to(dtype) * 0.3, torch.randn(outputs).to(dtype)
    values = ops.values_per_word(dtype)
    packed, gate_up = ops.pack_weight(weight, 1, values), ops.pack_weight(weight, 2, values)
    for rows in (1, 6, 12, 13, 200):
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        y = ops.packed_linear(x, weight, bias)
        assert same(ops.prepacked_linear(x, packed, bias, outputs), y)
        assert same(ops.prepacked_linear_add(x, packed, bias, residual), residual + y)
        for tanh in (True, False):
            assert same(ops.prepacked_linear_gelu(x, packed, bias, outputs, tanh), ops.gelu(y, tanh))
        both = ops.silu_mul(ops.packed_linear(x, weight, None))
        assert same(ops.prepacked_linear_silu_mul(x, gate_up, outputs // 2), both)


# Attention over a paged cache


class Cache:
    """One sequence's keys and values, written into shuffled blocks between blocks of NaN."""

    def __init__(self, keys: Tensor, values: Tensor, block_size: int) -> None:
        length, heads, dim = keys.shape
        blocks = -(-length // block_size)
        self.order = torch.randperm(blocks + 2)[:blocks].int()
        self.tensors = []
        for rows in (keys, values):
            cache = torch.full((blocks + 2, heads, block_size, dim), torch.nan, dtype=rows.dtype)
            padded = torch.full((blocks * block_size, heads, dim), torch.nan, dtype=rows.dtype)
            padded[:length] = rows
            cache[self.order.long()] = padded.unflatten(0, (blocks, block_size)).transpose(1, 2)
            self.tensors.append(cache)

    def attend(self, q: Tensor, start: int, stop: int, tree: bool = False) -> tuple[Tensor, Tensor]:
        """Rows [start, stop) of q as one chunk."""
        rows = stop - start
        mask = torch.tensor([2 ** (i + 1) - 1 if i < 63 else -1 for i in range(rows)]) if tree else None
        bounds, context = torch.tensor([0, rows]).int(), torch.tensor([stop]).int()
        scale = q.shape[-1] ** -0.5
        return ops.paged_attention(q[start:stop], *self.tensors, self.order[None], bounds, context, mask, scale)


def tokens(length: int, num_q_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as views of one packed projection."""
    qkv = torch.randn(length, (num_q_heads + 2 * num_kv_heads) * dim).to(dtype)
    q, k, v = qkv.split([num_q_heads * dim, num_kv_heads * dim, num_kv_heads * dim], dim=1)
    return q.unflatten(1, (-1, dim)), k.unflatten(1, (-1, dim)), v.unflatten(1, (-1, dim))


PAGED = [(1, 4, 2, 72, 150), (8, 2, 2, 8, 130), (32, 4, 1, 128, 1100), (16, 8, 1, 72, 70), (32, 6, 2, 72, 600)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block_size", "num_q_heads", "num_kv_heads", "dim", "length"), PAGED)
def test_chunks(
    block_size: int, num_q_heads: int, num_kv_heads: int, dim: int, length: int, dtype: torch.dtype
) -> None:
    q, k, v = tokens(length, num_q_heads, num_kv_heads, dim, dtype)
    cache = Cache(k, v, block_size)
    whole = cache.attend(q, 0, length)
    for chunk in (1, 7, 64):
        # All of a short sequence, the two ends and the edge of the first split of a long one.
        starts = [s for s in range(0, length, chunk) if length < 200 or s < chunk or s > length - 80 or 440 < s < 520]
        for start in starts:
            stop = min(start + chunk, length)
            for found, expected in zip(cache.attend(q, start, stop), whole, strict=True):
                assert same(found, expected[start:stop]), (chunk, start)
    other = Cache(k, v, 24).attend(q, 0, length)
    assert same(other[0], whole[0]) and same(other[1], whole[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_that_run_on_their_own(dtype: torch.dtype) -> None:
    """A long chunk folds its splits in one pass, a decoded token stores them and folds them in a second."""
    q, k, v = tokens(1500, 8, 2, 128, dtype)
    cache = Cache(k, v, 32)
    whole = cache.attend(q, 0, 1500)
    for token in (0, 63, 64, 511, 512, 1023, 1024, 1100, 1499):
        for found, expected in zip(cache.attend(q, token, token + 1), whole, strict=True):
            assert same(found, expected[token : token + 1]), token


def test_a_chain_is_a_chunk() -> None:
    q, k, v = tokens(700, 4, 2, 72, torch.float32)
    cache = Cache(k, v, 32)
    for start, stop in ((0, 64), (60, 70), (505, 520), (636, 700)):
        chunk, chain = cache.attend(q, start, stop), cache.attend(q, start, stop, tree=True)
        assert same(chain[0], chunk[0]) and same(chain[1], chunk[1]), start


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "before", "rows"), [
    ((4, 2), 72, 3, 9), ((4, 1), 128, 60, 12), ((8, 4), 72, 505, 20), ((2, 2), 8, 1020, 64), ((6, 2), 72, 0, 30),
])  # fmt: skip
def test_a_branch_of_a_tree_is_a_chain(
    heads: tuple[int, int], dim: int, before: int, rows: int, dtype: torch.dtype
) -> None:
    """Whatever lies between its tokens in the cache, also across the edges of tiles and splits."""
    generator = torch.Generator().manual_seed(rows)
    parents = [-1] + [int(torch.randint(max(0, i - 3), i, (), generator=generator)) for i in range(1, rows)]
    q, k, v = tokens(before + rows, *heads, dim, dtype)
    branches: list[list[int]] = []
    for row, parent in enumerate(parents):
        branches.append([*(branches[parent] if row else []), row])
    mask = torch.tensor([sum(1 << row for row in branch) - (2**64 if branch[-1] == 63 else 0) for branch in branches])
    bounds, context = torch.tensor([0, rows]).int(), torch.tensor([before + rows]).int()
    cache = Cache(k, v, 16)
    tree = ops.paged_attention(q[before:], *cache.tensors, cache.order[None], bounds, context, mask, dim**-0.5)
    for branch in branches:
        picked = torch.tensor([*range(before), *(before + row for row in branch)])
        length = len(picked)
        alone = Cache(k[picked], v[picked], 16).attend(q[picked], length - 1, length)
        for found, expected in zip(tree, alone, strict=True):
            assert same(found[branch[-1]][None], expected), branch


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_in_any_batch(dtype: torch.dtype) -> None:
    lengths, rows = [5, 70, 1, 530, 64], [2, 70, 1, 3, 9]
    sequences = [tokens(length, 4, 2, 72, dtype) for length in lengths]
    caches = [Cache(k, v, 16) for _, k, v in sequences]
    alone = [
        cache.attend(q, length - n, length)
        for cache, (q, _, _), length, n in zip(caches, sequences, lengths, rows, strict=True)
    ]
    for order in (range(5), [3, 0, 4], [1, 2]):
        picked = list(order)
        table = torch.full((len(picked), 40), -1, dtype=torch.int32)
        base = 0
        for at, b in enumerate(picked):
            table[at, : len(caches[b].order)] = caches[b].order + base
            base += len(caches[b].tensors[0])
        q = torch.cat([sequences[b][0][lengths[b] - rows[b] :] for b in picked])
        keys, values = (torch.cat([caches[b].tensors[i] for b in picked]) for i in (0, 1))
        bounds = torch.tensor([0, *(rows[b] for b in picked)]).cumsum(0).int()
        context = torch.tensor([lengths[b] for b in picked]).int()
        found = ops.paged_attention(q, keys, values, table, bounds, context, None, 72**-0.5)
        for i in (0, 1):
            assert same(found[i], torch.cat([alone[b][i] for b in picked])), (picked, i)


# Attention over packed sequences


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads", "dim"), [(4, 2, 72), (2, 2, 128), (3, 1, 8)])
def test_training_and_serving_agree(num_q_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = tokens(601, num_q_heads, num_kv_heads, dim, dtype)
    packed = ops.varlen_attention(q, k, v, torch.tensor([0, 601]).int(), 601, True, dim**-0.5)
    paged = Cache(k, v, 32).attend(q, 0, 601)
    assert same(packed[0], paged[0]) and same(packed[1], paged[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packing(causal: bool, dtype: torch.dtype) -> None:
    lengths = [3, 100, 0, 65, 1, 520]
    parts = [tokens(length, 4, 2, 72, dtype) for length in lengths]

    def both(picked: list[int]) -> tuple[Tensor, ...]:
        q, k, v = (torch.cat([parts[b][i] for b in picked]) for i in range(3))
        bounds = torch.tensor([0, *(lengths[b] for b in picked)]).cumsum(0).int()
        settings = (bounds, max(lengths), causal, 72**-0.5)
        o, lse = ops.varlen_attention(q, k, v, *settings)
        grads = ops.varlen_attention_backward(q * 0.5, lse * 0.1, q, k, v, *settings, o, lse)
        return o, lse, *grads

    alone = [both([b]) for b in range(len(lengths))]
    for picked in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [4, 2, 0]):
        for i, found in enumerate(both(picked)):
            assert same(found, torch.cat([alone[b][i] for b in picked])), (picked, i)


# Everything that works row by row

D = 72


def small_ops(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """Per op, a function of tensors whose first axis is the row."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(37, *shape).to(dtype)

    weight, bias = torch.randn(130).to(dtype), torch.randn(130).to(dtype)
    head, positions = torch.randn(D).to(dtype), torch.randint(0, 5000, (37, 3))
    angles = torch.randn(37, D // 2)
    states = (rows(2, D), torch.randn(37, 2), rows(2, D), torch.randn(37, 2))
    sections = [10, 13, 13]
    return {
        "rms_norm": (lambda x: ops.rms_norm(x, weight, 1e-6), (rows(130),)),
        "add_rms_norm": (lambda x, r: ops.add_rms_norm(x, r, weight, 1e-6), (rows(130), rows(130))),
        "layer_norm": (lambda x: ops.layer_norm(x, weight, bias, 1e-6), (rows(130),)),
        "silu_mul": (ops.silu_mul, (rows(142),)),
        "gelu_tanh": (lambda x: ops.gelu(x, True), (rows(71),)),
        "gelu_erf": (lambda x: ops.gelu(x, False), (rows(71),)),
        "rope_2d": (ops.rope_2d, (rows(3, D), angles.cos(), angles.sin())),
        "mrope": (lambda x, p: ops.mrope(x, p.T.contiguous(), sections, 1e6), (rows(3, D), positions)),
        "qk_norm_mrope": (
            lambda x, p: ops.qk_norm_mrope(x, head, head, p.T.contiguous(), sections, 1e6, 1e-6, 1),
            (rows(4 * D), positions),
        ),
        "merge_attention_states": (ops.merge_attention_states, states),
        "token_logprobs": (ops.token_logprobs, (rows(1000), torch.randint(0, 1000, (37,)))),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", small_ops(torch.float32))
def test_rows(name: str, dtype: torch.dtype) -> None:
    op, inputs = small_ops(dtype)[name]

    def call(start: int, stop: int) -> tuple[Tensor, ...]:
        result = op(*(x[start:stop] for x in inputs))
        return result if isinstance(result, tuple) else (result,)

    whole = call(0, 37)
    for size in (1, 2, 5, 16):
        for start in range(0, 37, size):
            stop = min(start + size, 37)
            for found, expected in zip(call(start, stop), whole, strict=True):
                assert same(found, expected[start:stop]), (size, start)


# Threads and instruction sets


def threaded_calls() -> list[Tensor]:
    torch.manual_seed(1)
    q, k, v = tokens(600, 4, 2, 72, torch.float32)
    settings = (torch.tensor([0, 90, 600]).int(), 510, True, 72**-0.5)
    o, lse = ops.varlen_attention(q, k, v, *settings)
    found = [o, lse, *ops.varlen_attention_backward(q, lse, q, k, v, *settings, o, lse)]
    cache = Cache(k, v, 32)
    found += [*cache.attend(q, 0, 600), *cache.attend(q, 599, 600)]
    x, weight = torch.randn(150, 300), torch.randn(700, 300)
    found += [ops.packed_linear(x, weight, None), ops.packed_linear(x[:1], weight, None)]
    one, zero = torch.ones(9), torch.zeros(9, dtype=torch.int32)
    seeds, none = torch.arange(9), torch.zeros(10, dtype=torch.int32)
    found.append(
        ops.sample(
            torch.randn(9, 5000), one, zero, one * 0.9, one * 0, one, one * 0, one * 0,
            zero[:0], none, zero, seeds, seeds, seeds, None,
        )
    )  # fmt: skip
    return found


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = threaded_calls()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(alone, threaded_calls(), strict=True)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "amx"])
def test_on_every_instruction_set(isa: str) -> None:
    if os.environ.get("KVKEYE_CPU_ISA"):
        pytest.skip("KVKEYE_CPU_ISA is set: this run is about that instruction set only")
    if torch.ops.kvkeye_cpu.cpu_isa() == isa:
        pytest.skip(f"{isa} is the one that the other tests of this file run on")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"KVKEYE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    if "does not support it" in child.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert child.returncode == 0, child.stdout[-3000:]
