"""The vision tower against PaddleOCR-VL's, on photographs."""

from __future__ import annotations

import pytest
import torch
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle

from kvkeye import ops
from kvkeye.layers import PackedContext, PatchAttention
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.models.keye.vision import axial_angles
from kvkeye.testing.tiny import tiny_keye_model
from tests.models import references
from tests.models.conftest import missing_kernels

CLIP = MediaGrid("video", (3, 4, 6), 0.5)


def clip_pixels() -> torch.Tensor:
    return torch.cat([references.photograph(name, 4, 6) for name in ("chelsea.png", "coffee.png", "astronaut.png")])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_two_photographs_in_one_pack(backend):
    model = tiny_keye_model()
    pixels, items = references.two_photographs()
    expected = references.vision_tower(model)(references.as_images(pixels), grid_thw=references.grid_tensor(items))
    close(model.visual(pixels, items), expected.last_hidden_state)


@torch.no_grad()
def test_1_5_attends_per_frame(backend):
    model = tiny_keye_model("1.5")
    reference = references.vision_tower(model)
    expected = reference(references.as_images(clip_pixels()), grid_thw=references.grid_tensor([CLIP]))
    close(model.visual(clip_pixels(), [CLIP]), expected.last_hidden_state)
    frames = [MediaGrid("video", (1, 4, 6))] * 3
    assert torch.equal(model.visual(clip_pixels(), frames), model.visual(clip_pixels(), [CLIP]))


@torch.no_grad()
def test_preview_attends_over_the_whole_clip(backend, monkeypatch):
    model = tiny_keye_model("preview")
    reference = references.vision_tower(model)
    pixels, grid = references.as_images(clip_pixels()), references.grid_tensor([CLIP])
    per_frame = reference(pixels, grid_thw=grid).last_hidden_state
    monkeypatch.setattr(
        paddle, "get_vision_attention_seqlens", lambda *_, **__: (torch.tensor([0, 72], dtype=torch.int32), 72)
    )
    joint = reference(pixels, grid_thw=grid).last_hidden_state
    actual = model.visual(clip_pixels(), [CLIP])
    close(actual, joint)
    assert (actual - per_frame).abs().max() > 0.1


@torch.no_grad()
def test_joint_attention_is_a_dense_softmax(backend):
    torch.manual_seed(1)
    layer = PatchAttention(144, 2)
    x = torch.randn(48, 144)
    angles = axial_angles(4, 6, 72, 10000.0, torch.device("cpu")).repeat(2, 1)
    actual = layer(x, angles.cos(), angles.sin(), PackedContext.from_lengths([48]))

    def rotate(heads: torch.Tensor) -> torch.Tensor:  # complex numbers instead of halves
        turned = torch.view_as_complex(torch.stack(heads.chunk(2, -1), -1)) * torch.exp(1j * angles)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = (x @ w.T + b for w, b in zip(layer.qkv_proj.weight.chunk(3), layer.qkv_proj.bias.chunk(3)))
    q, k, v = rotate(q.view(48, 2, 72)), rotate(k.view(48, 2, 72)), v.view(48, 2, 72)
    weights = torch.softmax(torch.einsum("ihd,jhd->hij", q, k) / 72**0.5, -1)
    expected = torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ layer.out_proj.weight.T + layer.out_proj.bias
    close(actual, expected, 1e-5)


@torch.no_grad()
def test_an_item_does_not_depend_on_its_pack(backend):
    model = tiny_keye_model()
    pixels, items = references.two_photographs()
    together = model.visual(pixels, items)
    alone = torch.cat([model.visual(pixels[:96], items[:1]), model.visual(pixels[96:], items[1:])])
    if backend == "cpp":
        assert torch.equal(together, alone)
    else:
        close(together, alone, 1e-5)


def test_gradients(backend):
    model = tiny_keye_model()
    reference = references.vision_tower(model)
    pixels, items = references.two_photographs()
    weight = torch.randn(156, 144)
    (model.visual(pixels, items) * weight).sum().backward()
    output = reference(references.as_images(pixels), grid_thw=references.grid_tensor(items)).last_hidden_state
    (output[0] if output.dim() == 3 else output).mul(weight).sum().backward()
    found = references.hub_gradients(model, "visual.")
    compared = 0
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1)
            close(found[name] / scale, parameter.grad / scale)
            compared += 1
    assert compared == len(found) == 37


def test_bf16():
    if reasons := missing_kernels():
        pytest.skip(f"bf16 is compared on the compiled ops, which are not complete here: {reasons[0]}")
    pixels, items = references.two_photographs()
    with torch.no_grad(), ops.use_backends("cpp"):
        expected = tiny_keye_model().visual(pixels, items)
        actual = tiny_keye_model(dtype=torch.bfloat16).visual(pixels, items)
    assert actual.dtype == torch.bfloat16
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 2e-2


def test_angles():
    config = tiny_keye_model().config.vision
    reference = paddle.PaddleOCRVisionRotaryEmbedding(references._paddle_vision_config(tiny_keye_model()))
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(50), indexing="ij")
    cos, sin = reference(torch.zeros(1), torch.stack((rows.flatten(), columns.flatten()), -1))
    angles = axial_angles(30, 50, config.head_dim, config.rope_theta, torch.device("cpu"))
    # Up to 49 radians in fp32: an ulp of the reference's frequency moves the angle by 49 * 2^-23.
    torch.testing.assert_close(angles.cos(), cos[:, :36], atol=6e-6, rtol=0)
    torch.testing.assert_close(angles.sin(), sin[:, :36], atol=6e-6, rtol=0)


@pytest.mark.parametrize(("version", "expected"), [("preview", [24, 72, 24]), ("1.5", [24, 24, 24, 24, 24])])
def test_segments(version, expected):
    image = MediaGrid("image", (1, 4, 6))
    assert tiny_keye_model(version).visual.segments([image, CLIP, image]) == expected
