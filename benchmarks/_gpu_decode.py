"""What benchmarks/gpu.py times of the engine: a decode step of Qwen3-8B's geometry.

Recorded and not, free and invariant; random weights. The limit is reading every weight and every
key and value of the context once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _engine_checkpoint import GEOMETRIES, Geometry
from torch import Tensor

from kvkeye.engine.backends import SERVING_OPS, gpu_backends, gpu_choice
from kvkeye.engine.batch import TokenInputs
from kvkeye.engine.graphs import CudaRecorder, rerun
from kvkeye.engine.runner import Runner
from kvkeye.engine.staging import to_device
from kvkeye.models.keye.model import KeyeModel

BLOCK = 32
Times = Callable[[list[Callable[[], Any]], int], list[float]]


def wall_times(sides: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median milliseconds of each side by the clock, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, record in zip(sides, times, strict=True):
            start = time.perf_counter()
            side()
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def random_model(geometry: Geometry, device: torch.device) -> KeyeModel:
    """In bf16, filled on the device; matrices keep the size of what goes through them."""
    with torch.device("meta"):
        model = KeyeModel(geometry.config()).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def decode_inputs(batch: int, context: int) -> TokenInputs:
    """One new token of each of `batch` rows, the last of `context`, blocks in shuffled order."""
    width = -(-context // BLOCK)
    table = torch.randperm(batch * width, generator=torch.Generator().manual_seed(1)).view(batch, width)
    place = context - 1
    return TokenInputs(
        token_ids=torch.arange(batch),
        positions=torch.full((3, batch), place),
        block_table=table.int(),
        cu_seqlens_q=torch.arange(batch + 1, dtype=torch.int32),
        context_lens=torch.full((batch,), context, dtype=torch.int32),
        slot_mapping=table[:, place // BLOCK] * BLOCK + place % BLOCK,
    )


class Side:
    """One way to run the step: a runner over caches and weights that all sides share."""

    def __init__(self, model: KeyeModel, caches: tuple[list[Tensor], list[Tensor]], backends: str) -> None:
        self.runner = Runner(model, 0, BLOCK, backends)
        self.runner.k_caches, self.runner.v_caches = caches

    def eager(self, inputs: TokenInputs) -> Tensor:
        with self.runner._forced():
            return self.runner._all_rows(inputs)[0]

    def recorded(self, inputs: TokenInputs, packed: Tensor) -> Callable[[], Tensor]:
        batch, width = inputs.block_table.shape
        record = CudaRecorder(packed.device) if packed.is_cuda else rerun
        self.runner.record([batch], width, record)
        graphs = self.runner._graphs
        assert graphs is not None
        return lambda: graphs(inputs, packed)


@torch.inference_mode()
def decode_row(
    device: torch.device, batch: int, context: int, bandwidth: float | None, times: Times, name: str = "qwen3-8b"
) -> dict[str, Any]:
    """Figures of one step, after the recorded sides gave the bits of the eager ones."""
    geometry = GEOMETRIES[name]
    model = random_model(geometry, device)
    inputs, packed = to_device(decode_inputs(batch, context), device)
    text = geometry.text
    shape = (batch * inputs.block_table.shape[1], text.num_key_value_heads, BLOCK, text.head_dim)
    caches: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layers in caches:
        layers += [torch.randn(shape, device=device).to(model.dtype) for _ in range(text.num_hidden_layers)]
    specifications = {"free": "", "invariant": "cpp"}
    if device.type == "cuda":
        for way in specifications:
            choices = [gpu_choice(op, model.dtype, way == "invariant") for op in SERVING_OPS if op != "verify_draft"]
            specifications[way] = gpu_backends(choices, device, way == "invariant")
    sides: dict[str, Callable[[], Tensor]] = {}
    for way, backends in specifications.items():
        side = Side(model, caches, backends)
        sides[f"{way}, recorded"] = side.recorded(inputs, packed)
        sides[f"{way}, eager"] = lambda side=side: side.eager(inputs)  # type: ignore[misc]
        equal = torch.equal(sides[f"{way}, recorded"](), sides[f"{way}, eager"]())
        assert equal, f"the recorded {way} step gives other bits than the eager one"
    found = dict(zip(sides, times(list(sides.values()), 20), strict=True))
    num_bytes = geometry.weight_bytes() + geometry.kv_bytes(batch, context)
    return {
        "ms": found["free, recorded"],
        "sides_ms": found,
        "invariant_over_free": found["invariant, recorded"] / found["free, recorded"],
        "bytes": num_bytes,
        "share_of_copy": num_bytes / (found["free, recorded"] * 1e-3) / bandwidth if bandwidth else None,
    }
