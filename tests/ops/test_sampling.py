"""What the seeds promise: the right distribution, and draws that depend on nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvkeye import ops


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, **given: float) -> Tensor:
    batch = logits.shape[0]

    def full(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch,), given.get(name, default), dtype=dtype)

    return ops.sample(
        logits,
        full("temperature", 1.0, torch.float32), full("top_k", 0, torch.int32), full("top_p", 1.0, torch.float32),
        full("min_p", 0.0, torch.float32), full("repetition", 1.0, torch.float32),
        full("presence", 0.0, torch.float32), full("frequency", 0.0, torch.float32),
        torch.empty(0, dtype=torch.int32), torch.zeros(batch + 1, dtype=torch.int32),
        torch.zeros(batch, dtype=torch.int32), seeds, positions, torch.zeros(batch, dtype=torch.int64), None,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_distribution(backend: str) -> None:
    """Chi-square of the draws against the softmax, at the 1e-6 level."""
    count = 20_000 if backend == "cpp" else 3_000
    probability = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    with ops.use_backends(backend):
        tokens = draw(probability.log().expand(count, 5).contiguous(), torch.full((count,), 11), torch.arange(count))
    observed = torch.bincount(tokens, minlength=5).double()
    expected = probability.double() * count
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < 33.4  # quantile 1 - 1e-6 with 4 degrees of freedom


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_draw_depends_on_its_own_row_only(backend: str) -> None:
    logits = torch.randn(16, 97)
    seeds, positions = torch.arange(16) * 7919, torch.arange(16) + 3
    settings = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}
    with ops.use_backends(backend):
        together = draw(logits, seeds, positions, **settings)
        for b in range(16):
            alone = draw(logits[b : b + 1], seeds[b : b + 1], positions[b : b + 1], **settings)
            assert int(alone) == int(together[b])


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_top_p_keeps_the_token_that_crosses(backend: str) -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(400, 3).contiguous()
    with ops.use_backends(backend):
        tokens = draw(logits, torch.full((400,), 5), torch.arange(400), top_p=0.6)
    assert set(tokens.tolist()) == {0, 1}
