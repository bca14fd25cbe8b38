"""Cases of the speculative family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvkeye import ops
from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

_DEFAULTS: dict[str, tuple[float, torch.dtype]] = {
    "temperature": (1.0, torch.float32), "top_k": (0, torch.int32), "top_p": (1.0, torch.float32),
    "min_p": (0.0, torch.float32), "repetition": (1.0, torch.float32), "presence": (0.0, torch.float32),
    "frequency": (0.0, torch.float32),
}  # fmt: skip
# A lone root, a chain, a root with three children, a bush, two levels.
_TREES = ([-1], [-1, 0, 1, 2, 3], [-1, 0, 0, 0], [-1, 0, 1, 1, 2, 0, 5, 5], [-1, 0, 0, 1, 2])


def verify_call(
    sample: Sample,
    logits: torch.Tensor,
    trees: tuple[list[int], ...],
    probable: bool = False,
    mask: torch.Tensor | None = None,
    **given: Any,
) -> tuple[Any, ...]:
    """Arguments of verify_draft over trees given by their parents; proposals are among the four likeliest tokens."""
    batch, vocabulary = len(trees), logits.shape[1]
    parents = [parent for tree in trees for parent in tree]
    bounds = torch.tensor([0, *map(len, trees)]).cumsum(0).tolist()
    likely = logits.double().nan_to_num(0, 0, 0).topk(min(4, vocabulary)).indices.cpu()
    tokens, siblings = [0] * len(parents), [0] * len(parents)
    for first, tree in zip(bounds, trees, strict=False):
        for row, parent in enumerate(tree):
            if row:
                place = siblings[first + parent] % likely.shape[1]
                tokens[first + row] = int(likely[first + parent, place])
                siblings[first + parent] += 1
    settings = [
        sample.tensor([given.get(name, default)] * batch, dtype) for name, (default, dtype) in _DEFAULTS.items()
    ]
    lengths = [3 * (b % 3) for b in range(batch)]
    history = sample.integers(0, vocabulary, sum(lengths), dtype=torch.int32)
    past = sample.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], torch.int32)
    shares = (logits.float().nan_to_num(0, 0, 0) + sample.fp32(*logits.shape)).softmax(-1) if probable else None
    return (
        logits, sample.tensor(tokens, torch.int64), sample.tensor(parents, torch.int32),
        sample.tensor(bounds, torch.int32), shares, *settings, history, past,
        sample.tensor([n // 2 for n in lengths], torch.int32), sample.integers(-(2**60), 2**60, batch),
        sample.integers(0, 2**40, batch), sample.integers(0, 8, batch), mask,
    )  # fmt: skip


@cases("verify_draft")
def _(sample: Sample) -> Iterator[Case | Bad]:
    rows = sum(map(len, _TREES))
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "greedy": {"temperature": 0.0},
        "cold": {"temperature": 0.3, "top_k": 20, "top_p": 0.95},
        "penalties": {"repetition": 1.3, "presence": 0.5, "frequency": 0.25, "temperature": 0.4},
        "penalties_greedy": {"repetition": 1.3, "frequency": 0.5, "temperature": 0.0},
        "min_p": {"min_p": 0.2},
    }
    for name, given in settings.items():
        yield Case(name, verify_call(sample, sample(rows, 97, scale=3.0), _TREES, **given))
        yield Case(name + "_probable", verify_call(sample, sample(rows, 97, scale=3.0), _TREES, True, **given))
    chain = [*range(-1, 63)]
    yield Case("64_rows", verify_call(sample, sample(64, 30, scale=9.0), (chain,), temperature=0.0))
    yield Case("wide", verify_call(sample, sample(64, 30, scale=2.0), ([-1] + [0] * 63,), True))
    yield Case("no_trees", verify_call(sample, sample(0, 30), ()))
    yield Case("empty_tree", verify_call(sample, sample(3, 30), ([-1, 0], [], [-1])))
    broken = sample(rows, 40, scale=3.0)
    broken[0, 3], broken[1, 0], broken[2, :] = float("nan"), float("inf"), float("-inf")
    yield Case("broken_rows", verify_call(sample, broken, _TREES, temperature=0.1))
    mask = sample.integers(-(2**31), 2**31, rows, 2, dtype=torch.int32)
    mask[1] = 0
    yield Case("mask", verify_call(sample, sample(rows, 40, scale=2.0), _TREES, mask=mask))
    yield Case("mask_probable", verify_call(sample, sample(rows, 40, scale=2.0), _TREES, True, mask=mask))
    if sample.big:
        trees = ([*range(-1, 8)],) * 8
        args = verify_call(sample, sample(72, 151936, scale=3.0), trees, temperature=0.6, top_k=20, top_p=0.95)
        yield Case("8x9x151936", args, Cost(bytes=72 * 151936 * sample.itemsize), small=False, bench=True)
    good = list(verify_call(sample, sample(5, 40), ([-1, 0, 1], [-1, 0]), True))
    yield Bad("logits", (sample(40), *good[1:]), "expected [R, V]")
    yield Bad("tokens", (good[0], good[1].int(), *good[2:]), "draft_tokens is")
    yield Bad("parents", (*good[:2], good[2][:3], *good[3:]), "tree_parents is")
    yield Bad("bounds", (*good[:3], good[3].long(), *good[4:]), "expected int32 [B + 1]")
    yield Bad("probabilities", (*good[:4], good[4][:2], *good[5:]), "draft_probs is")
    yield Bad("temperature", (*good[:5], good[5].double(), *good[6:]), "temperature is")
    yield Bad("mask", (*good[:18], sample.integers(0, 1, 2, 2, dtype=torch.int32)), "expected int32 [5, 2]")


def tree_call(
    sample: Sample, counts: list[int], contexts: list[int], depth: int, width: int, low: float, heads: int = 2,
    hidden: int = 64, vocabulary: int = 40, packed: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of draft_tree. The output weights are large: no two tokens are nearly as likely as each other."""
    dim, kv_heads, block_size, wide = 64, 1, 16, 96
    room = -(-(max([*contexts, 1]) + depth * width) // block_size)
    shapes = {
        "fuse": (hidden, 3 * hidden), "input_norm": (hidden,), "hidden_norm": (hidden,),
        "qkv": ((heads + 2 * kv_heads) * dim, 2 * hidden), "q_norm": (dim,), "k_norm": (dim,),
        "out": (hidden, heads * dim), "post_norm": (hidden,), "gate_up": (2 * wide, hidden), "down": (hidden, wide),
        "norm": (hidden,), "head": (vocabulary, hidden),
    }  # fmt: skip
    weights = []
    for name, shape in shapes.items():
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5 * (4.0 if name == "head" else 1.0)
        weight = sample(*shape, scale=scale)
        if packed and len(shape) == 2:
            weight = ops.pack_weight(weight, 2 if name == "gate_up" else 1, ops.values_per_word(sample.dtype))
        weights.append(weight)
    rows, blocks = sum(counts), len(contexts) * room
    caches = [sample(blocks, kv_heads, block_size, dim) for _ in range(2)]
    table = sample.permutation(blocks).view(len(contexts), room).to(torch.int32)
    positions = [at for count, context in zip(counts, contexts, strict=True) for at in range(7, 7 + count)]
    return (
        sample(rows, 3 * hidden), sample(rows, hidden), sample(vocabulary, hidden), weights, *caches, table,
        sample.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], torch.int32),
        sample.tensor(contexts, torch.int32), sample.tensor(positions, torch.int64), [8, 12, 12], heads, wide, 1e4,
        1e-6, depth, width, low,
    )  # fmt: skip


@cases("draft_tree")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("chain", tree_call(sample, [1], [30], 5, 1, 0.0))
    yield Case("chains", tree_call(sample, [3, 1, 2], [40, 1, 16], 4, 1, 0.0))
    yield Case("tree", tree_call(sample, [2], [20], 4, 3, 0.0))
    yield Case("trees", tree_call(sample, [1, 4], [5, 33], 3, 2, 0.0))
    yield Case("likely_ones", tree_call(sample, [2, 1, 1], [9, 17, 25], 6, 2, 0.2))
    yield Case("plain_weights", tree_call(sample, [2], [20], 3, 2, 0.0, packed=False), must_accept=())
    yield Case("none_likely", tree_call(sample, [1], [12], 3, 2, 1.1))
    broken = tree_call(sample, [1, 1], [12, 5], 3, 2, 0.0)
    broken[3][-1].view(-1)[3] = float("nan")
    yield Case("broken_output_weight", broken)
    yield Case("likely_chains", tree_call(sample, [2, 1, 1], [9, 17, 25], 6, 1, 0.2))
    good = tree_call(sample, [1], [12], 3, 2, 0.0)
    yield Bad("weights", (*good[:3], good[3][:-1], *good[4:]), "weights are 11; expected 12")
    yield Bad("too_many_nodes", (*good[:15], 8, 8, 0.0), "depth is 8, width 8")
    yield Bad("features", (good[0][:, 1:], *good[1:]), "features is")
    yield Bad("positions", (*good[:9], good[9].to(torch.int32), *good[10:]), "positions is torch.int32")
    yield Bad("no_vocabulary", (*good[:2], good[2][:0], *good[3:]), "vocabulary is (0, 64); expected [Vd, H]")
