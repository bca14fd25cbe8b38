"""torch.compile over the ops, without a break in the graph: once with code generation, else by its tracer alone."""

from __future__ import annotations

import pytest
import torch

from kvkeye.layers import PackedContext
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.testing.tiny import tiny_keye_model


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_language_model(backend):
    model = tiny_keye_model()
    context = PackedContext.from_lengths([17, 13])
    embeds = torch.randn(30, 128)
    positions = torch.arange(30).expand(3, 30).contiguous()

    def run(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model.logits(model(embeds, positions, context))

    with torch.no_grad():
        expected = run(embeds, positions)
        actual = torch.compile(run, fullgraph=True)(embeds, positions)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_gradients():
    model = tiny_keye_model()
    context = PackedContext.from_lengths([17, 13])
    embeds = torch.randn(30, 128)
    positions = torch.arange(30).expand(3, 30).contiguous()

    def run(embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(embeds, positions, context).square().mean()

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        function(embeds, positions).backward()
        gradients.append([p.grad.clone() for p in model.language.layers.parameters()])
    for actual, expected in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vision_tower():
    model = tiny_keye_model()
    items = [MediaGrid("image", (1, 4, 6)), MediaGrid("video", (2, 4, 4), 0.5)]
    pixels = torch.randn(24 + 32, 588)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return model.encode_media(pixels, items)

    actual = torch.compile(run, fullgraph=True, backend="aot_eager")(pixels)
    torch.testing.assert_close(actual, run(pixels), atol=1e-5, rtol=1e-5)
