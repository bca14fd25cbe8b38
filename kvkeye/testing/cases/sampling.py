"""Cases of the sampling family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

_DEFAULTS: dict[str, tuple[float, torch.dtype]] = {
    "temperature": (1.0, torch.float32), "top_k": (0, torch.int32), "top_p": (1.0, torch.float32),
    "min_p": (0.0, torch.float32), "repetition": (1.0, torch.float32), "presence": (0.0, torch.float32),
    "frequency": (0.0, torch.float32),
}  # fmt: skip


def _call(
    sample: Sample, logits: torch.Tensor, mask: torch.Tensor | None = None, past: int = 3, **given: Any
) -> tuple[Any, ...]:
    batch, vocabulary = logits.shape
    settings = [
        sample.tensor([given.get(name, default)] * batch, dtype) for name, (default, dtype) in _DEFAULTS.items()
    ]
    lengths = [past * (b % 3) for b in range(batch)]
    history = sample.integers(0, vocabulary, sum(lengths), dtype=torch.int32)
    bounds = sample.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], torch.int32)
    return (
        logits, *settings, history, bounds, sample.tensor([n // 2 for n in lengths], torch.int32),
        sample.integers(-(2**60), 2**60, batch), sample.integers(0, 2**40, batch), sample.integers(0, 8, batch), mask,
    )  # fmt: skip


@cases("sample")
def _(sample: Sample) -> Iterator[Case | Bad]:
    settings: dict[str, dict[str, Any]] = {
        "plain": {},
        "greedy": {"temperature": 0.0},
        "hot": {"temperature": 1.7},
        "top_k": {"top_k": 5},
        "top_k_wide": {"top_k": 5000},
        "top_p": {"top_p": 0.7},
        "top_p_tiny": {"top_p": 1e-6},
        "min_p": {"min_p": 0.2},
        "penalties": {"repetition": 1.3, "presence": 0.5, "frequency": 0.25},
        "all": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition": 1.1},
    }
    for name, given in settings.items():
        yield Case(name, _call(sample, sample(6, 307, scale=3.0), **given))
    ties = sample(4, 64) * 0
    yield Case("ties_greedy", _call(sample, ties, temperature=0.0))
    yield Case("ties_top_k", _call(sample, ties, top_k=3))
    broken = sample(5, 40, scale=2.0)
    broken[0, 3], broken[1, 0], broken[2, :] = float("nan"), float("inf"), float("-inf")
    yield Case("broken_rows", _call(sample, broken))
    mask = sample.integers(-(2**31), 2**31, 5, 2, dtype=torch.int32)
    mask[4] = 0
    yield Case("mask", _call(sample, sample(5, 40, scale=2.0), mask))
    yield Case("vocabulary_above_2^20", _call(sample, sample(1, 2**20 + 1), temperature=0.0), small=False)
    if sample.big:
        cost = Cost(bytes=8 * 151936 * sample.itemsize)
        logits = sample(8, 151936, scale=3.0)
        some = sample.integers(-(2**31), 2**31, 8, 4748, dtype=torch.int32)
        penalties = {"repetition": 1.1, "presence": 0.5, "frequency": 0.2}
        full: dict[str, dict[str, Any]] = {
            "": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
            "_all": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, **penalties, "past": 2000},
            "_greedy": {"temperature": 0.0},
            "_plain": {},
            "_top_p": {"top_p": 0.95},
        }
        for name, given in full.items():
            args = _call(sample, logits, some if name == "_all" else None, **given)
            yield Case(f"8x151936{name}", args, cost, small=False, bench=True)
    good = list(_call(sample, sample(2, 40)))
    yield Bad("logits", (sample(40), *good[1:]), "expected [B, V]")
    yield Bad("temperature", (good[0], good[1].double(), *good[2:]), "temperature is")
    yield Bad("history", (*good[:8], good[8].long(), *good[9:]), "expected int32 [S]")
    yield Bad("bounds", (*good[:9], good[9][:1], *good[10:]), "cu_history is")
    yield Bad("mask", (*good[:14], sample.integers(0, 1, 2, 5, dtype=torch.int32)), "expected int32 [2, 2]")
