"""What benchmarks/gpu.py times of the encoder: passes over one large picture and over many small ones.

From pixels on the host to media embeddings, recorded and not, free and invariant; the tower of the 8B checkpoints with
random weights. Packs fill a recorded size exactly, so that both ways multiply the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _engine_checkpoint import GEOMETRIES
from _gpu_checks import recorder
from _gpu_decode import random_model, serving_orders
from _gpu_timing import Times
from _vision_geometry import SIGLIP, TINY, num_flops
from torch import Tensor

from kvkeye.engine.batch import EncodeBatch
from kvkeye.engine.runner import Runner
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.positions import MediaGrid

#: Pictures, and the patches of a side of each.
PACKS = ((1, 64), (16, 16))
TINY_PACKS = ((1, 16), (4, 8))


def geometry(is_tiny: bool) -> KeyeConfig:
    """The tower with the decoder's hidden size to project to, and next to nothing of the decoder."""
    config = GEOMETRIES["tiny" if is_tiny else "qwen3-8b"].config()
    text = replace(config.text, num_hidden_layers=1, vocab_size=320, tie_word_embeddings=True)
    return replace(config, text=text, vision=TINY if is_tiny else SIGLIP)


def pack(pictures: int, side: int, config: KeyeConfig) -> EncodeBatch:
    draw = torch.Generator().manual_seed(2)
    pixels = [torch.randn(side * side, config.vision.patch_dim, generator=draw).bfloat16() for _ in range(pictures)]
    names = [bytes([i]) for i in range(pictures)]
    return EncodeBatch(names, pixels, [MediaGrid("image", (1, side, side))] * pictures)


@torch.inference_mode()
def encode_row(pictures: int, side: int, device: torch.device, times: Times, is_tiny: bool) -> dict[str, Any]:
    """Figures of one pass, after the recorded sides gave the bits of the eager ones."""
    config = geometry(is_tiny)
    model = random_model(config, device)
    batch, num_patches = pack(pictures, side, config), pictures * side * side
    sides: dict[str, Callable[[], Tensor]] = {}
    for way, backends in serving_orders(device, model.dtype).items():
        runner = Runner(model, 1, 32, backends)
        runner.record_encoder([num_patches], recorder(device))
        sides[f"{way}, recorded"] = partial(_recorded, runner, batch)
        sides[f"{way}, eager"] = partial(_eager, runner, batch)
        equal = torch.equal(sides[f"{way}, recorded"](), sides[f"{way}, eager"]())
        assert equal, f"the recorded {way} pass gives other bits than the eager one"
    found = dict(zip(sides, times(list(sides.values()), 20), strict=True))
    flops = num_flops(config.vision, side * side, pictures)
    return {
        "ms": found["free, recorded"],
        "sides_ms": found,
        "patches": num_patches,
        "tflop_per_s": flops / found["free, recorded"] / 1e9,
    }


def _recorded(runner: Runner, batch: EncodeBatch) -> Tensor:
    assert runner._encoder_graphs is not None
    with runner._forced():
        embeds = runner._encoder_graphs(batch)
    assert embeds is not None, "the pack fits no recorded size"
    return embeds


def _eager(runner: Runner, batch: EncodeBatch) -> Tensor:
    with runner._forced():
        return runner._encode(batch)
