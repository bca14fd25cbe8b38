"""What benchmarks/gpu.py times of the engine: steps of Qwen3-8B's geometry.

A decode step, and one that verifies a chain of proposals and shows a draft head the features of three depths. Recorded
and not, free and invariant; random weights. The limit is reading every weight and every key and value of the context
once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _engine_checkpoint import GEOMETRIES
from _gpu_checks import recorder
from _gpu_timing import Times
from torch import Tensor

from kvkeye.engine.backends import FP8_REFERENCE, SERVING_OPS, gpu_backends, gpu_choice
from kvkeye.engine.batch import ForwardBatch, TokenInputs
from kvkeye.engine.decode_graphs import padded
from kvkeye.engine.memory import block_bytes
from kvkeye.engine.runner import Runner
from kvkeye.engine.staging import to_device
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel

BLOCK = 32


@dataclass(frozen=True)
class Step:
    """The last `fresh` tokens of each of `batch` rows of `context`; with more than one a draft head sees features.

    fp8: keys and values are e4m3 with scales.
    """

    geometry: str
    batch: int
    context: int
    fresh: int = 1
    fp8: bool = False

    @property
    def key(self) -> str:
        notes = (f"/head {self.fresh}" if self.fresh > 1 else "") + ("/fp8" if self.fp8 else "")
        return f"{self.geometry}/{self.batch}x{self.context}{notes}"

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else torch.bfloat16


STEPS = (
    Step("qwen3-8b", 1, 4096), Step("qwen3-8b", 1, 4096, 8), Step("qwen3-8b", 16, 4096),
    Step("qwen3-8b", 16, 4096, fp8=True),
)  # fmt: skip
TINY_STEPS = (Step("tiny", 1, 64), Step("tiny", 2, 64, 3), Step("tiny", 2, 64, fp8=True))


def wall_times(sides: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each side by the clock, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, record in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def random_model(config: KeyeConfig, device: torch.device) -> KeyeModel:
    """In bf16, filled on the device; matrices keep the size of what goes through them."""
    with torch.device("meta"):
        model = KeyeModel(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def serving_orders(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> dict[str, str]:
    """The order of implementations that an engine serves with, free and invariant; FP8 caches on a CPU have one."""
    orders = dict.fromkeys(("free", "invariant"), FP8_REFERENCE) if fp8 else {"free": "", "invariant": "cpp"}
    if device.type == "cuda":
        for way in orders:
            choices = [gpu_choice(op, dtype, way == "invariant") for op in SERVING_OPS if op != "verify_draft"]
            orders[way] = gpu_backends(choices, device, way == "invariant")
    return orders


def inputs_of(step: Step) -> TokenInputs:
    """On the host; blocks in shuffled order."""
    width, count = -(-step.context // BLOCK), step.batch * step.fresh
    table = torch.randperm(step.batch * width, generator=torch.Generator().manual_seed(1)).view(step.batch, width)
    places = torch.arange(step.context - step.fresh, step.context)
    return TokenInputs(
        token_ids=torch.arange(count),
        positions=places.repeat(3, step.batch),
        block_table=table.int(),
        cu_seqlens_q=torch.arange(0, count + 1, step.fresh, dtype=torch.int32),
        context_lens=torch.full((step.batch,), step.context, dtype=torch.int32),
        slot_mapping=(table[:, places // BLOCK] * BLOCK + places % BLOCK).flatten(),
    )


class Features:
    """Has three depths looked at, as an EAGLE-3 head does, and looks at nothing itself."""

    def __init__(self, num_layers: int) -> None:
        self.depths = (2, num_layers // 2, num_layers - 3) if num_layers > 8 else (0, 1, 2)

    def observe(self, batch: ForwardBatch, embeds: Tensor, features: Tensor, accepted: Mapping[int, list[int]]) -> None:
        """The pass alone is timed."""


def recorded(runner: Runner, inputs: TokenInputs, device: torch.device) -> Callable[[], Sequence[Tensor]]:
    size, width = len(inputs.token_ids), inputs.block_table.shape[1]
    runner.record([size], width, recorder(device))
    graphs = runner._graphs
    assert graphs is not None
    moved, packed = to_device(padded(inputs, size, width), device)
    return lambda: graphs(moved, packed)


def eager(runner: Runner, inputs: TokenInputs) -> Sequence[Tensor]:
    with runner._forced():
        return runner._all_rows(inputs)


def filled(runner: Runner) -> Runner:
    """Its caches with normal values; levels with scales of 1."""
    for cache in (*runner.k_caches, *runner.v_caches):
        cache.copy_(torch.randn(cache.shape, device=cache.device))
    for scales in (*runner.k_scales, *runner.v_scales):
        scales.fill_(1.0)
    return runner


@torch.inference_mode()
def decode_row(step: Step, device: torch.device, times: Times, bandwidth: float | None) -> dict[str, Any]:
    """Figures of one step, after the recorded sides gave the bits of the eager ones."""
    geometry = GEOMETRIES[step.geometry]
    text, model = geometry.text, random_model(geometry.config(), device)
    inputs = inputs_of(step)
    moved, _ = to_device(inputs, device)
    num_blocks, kept = inputs.block_table.numel(), step.cache_dtype
    observer = Features(text.num_hidden_layers) if step.fresh > 1 else None
    sides: dict[str, Callable[[], Sequence[Tensor]]] = {}
    shared: Runner | None = None
    for way, backends in serving_orders(device, model.dtype, step.fp8).items():
        runner = Runner(model, num_blocks if shared is None else 0, BLOCK, backends, observer, kept)
        shared = shared or filled(runner)
        for name in ("k_caches", "v_caches", "k_scales", "v_scales"):
            setattr(runner, name, getattr(shared, name))
        sides[f"{way}, recorded"] = recorded(runner, inputs, device)
        sides[f"{way}, eager"] = partial(eager, runner, moved)
        pairs = zip(sides[f"{way}, recorded"](), sides[f"{way}, eager"](), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), f"the recorded {way} step gives other bits than the eager one"
    found = dict(zip(sides, times(list(sides.values()), 20), strict=True))
    kv_bytes = step.batch * (step.context * block_bytes(text, BLOCK, kept) // BLOCK)
    num_bytes = geometry.weight_bytes() + kv_bytes
    return {
        "ms": found["free, recorded"],
        "sides_ms": found,
        "invariant_over_free": found["invariant, recorded"] / found["free, recorded"],
        "bytes": num_bytes,
        "share_of_copy": num_bytes / (found["free, recorded"] * 1e-3) / bandwidth if bandwidth else None,
    }
