"""What benchmarks/gpu.py times of a prompt: one pass of Qwen3-8B's geometry, free and invariant; random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from _engine_checkpoint import GEOMETRIES
from _gpu_decode import BLOCK, Step, inputs_of, random_model, serving_orders
from _gpu_timing import Times
from torch import Tensor

from kvkeye.engine.batch import TokenInputs
from kvkeye.engine.runner import Runner
from kvkeye.engine.staging import to_device

PROMPT = Step("qwen3-8b", 1, 4096, 4096)
TINY_PROMPT = Step("tiny", 1, 64, 64)


def chunk(inputs: TokenInputs, first: int, end: int) -> TokenInputs:
    """The tokens [first, end) of a step that holds one prompt."""
    return replace(
        inputs,
        token_ids=inputs.token_ids[first:end],
        positions=inputs.positions[:, first:end],
        cu_seqlens_q=torch.tensor([0, end - first], dtype=torch.int32, device=inputs.cu_seqlens_q.device),
        context_lens=torch.full_like(inputs.context_lens, end),
        slot_mapping=inputs.slot_mapping[first:end],
    )


def last_logits(runner: Runner, *parts: TokenInputs) -> Tensor:
    """[1, V] of the last token, the parts computed in turn."""
    with runner._forced():
        for part in parts:
            hidden, *_ = runner._decode(runner.model.embed(part.token_ids), part)
        logits: Tensor = runner.model.logits(hidden[-1:])
    return logits


@torch.inference_mode()
def prompt_row(step: Step, device: torch.device, times: Times) -> dict[str, Any]:
    """Figures of one prompt in one pass, after the invariant one gave the bits of the same prompt in three chunks."""
    geometry = GEOMETRIES[step.geometry]
    model = random_model(geometry.config(), device)
    inputs, _ = to_device(inputs_of(step), device)
    runners = {
        way: Runner(model, inputs.block_table.numel(), BLOCK, backends)
        for way, backends in serving_orders(device, model.dtype).items()
    }
    sides: dict[str, Callable[[], Tensor]] = {way: partial(last_logits, runners[way], inputs) for way in runners}
    bounds = (0, step.context // 3, step.context // 2 + 1, step.context)
    chunks = [chunk(inputs, *pair) for pair in pairwise(bounds)]
    same = torch.equal(sides["invariant"](), last_logits(runners["invariant"], *chunks))
    assert same, "the invariant prompt in three chunks has other bits than in one pass"
    found = dict(zip(sides, times(list(sides.values()), 10), strict=True))
    return {
        "ms": found["free"],
        "sides_ms": found,
        "invariant_over_free": found["invariant"] / found["free"],
        "tflop_per_s": geometry.prompt_flops(step.context) / found["free"] / 1e9,
    }
