"""The vision tower against PaddleOCR-VL's, on photographs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.paddleocr_vl import modeling_paddleocr_vl as paddle

from kvkeye import ops
from kvkeye.layers import PackedContext, PatchAttention
from kvkeye.models.keye.grid_cache import GridCache
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.models.keye.vision import axial_angles
from kvkeye.testing.tiny import tiny_keye_model
from tests.models import references
from tests.models.conftest import missing_kernels
from tests.watch import Watch

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


@torch.no_grad()
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_nothing_is_read_back_between_the_first_and_the_last_layer(version, backend):
    model = tiny_keye_model(version)
    pixels, items = references.two_photographs()
    layout = model.visual.layout(items)
    with Watch() as watch:
        model.visual.encode(pixels, layout)
    # Attention of both layers was among what was watched, once for all items.
    assert watch.seen.count("varlen_attention") == len(model.visual.layers)


@torch.no_grad()
def test_the_watch_of_host_reads_can_fail():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        torch.ones(3).max().item()


@torch.no_grad()
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_a_whole_pack_runs_without_any_data(version):
    """On the meta device there is nothing to read: whoever asks for a value gets an error."""
    model = tiny_keye_model(version).to("meta")
    _, items = references.two_photographs()
    features = model.encode_media(torch.empty(156 + 72, 588, device="meta"), [*items, CLIP])
    assert features.shape == ((156 + 72) // 4, 128) and features.is_meta


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_any_mixture_has_the_bits_of_each_item_alone(version, dtype):
    if reasons := missing_kernels():
        pytest.skip(f"equal bits are a promise of the compiled ops, which are not complete here: {reasons[0]}")
    model = tiny_keye_model(version, dtype=dtype)
    grids = [(1, 6, 10), (1, 2, 2), (3, 4, 6), (1, 6, 10), (1, 2, 40), (2, 4, 6), (1, 26, 22)]
    items = [MediaGrid("video" if grid[0] > 1 else "image", grid) for grid in grids]
    generator = torch.Generator().manual_seed(5)
    pixels = [torch.randn(item.num_patches, 588, generator=generator) for item in items]
    with ops.use_backends("cpp"):
        alone = [model.encode_media(rows, [item]) for rows, item in zip(pixels, items)]
        for order in (range(7), [6, 2, 5, 0, 1, 4, 3], [3, 1, 2]):
            packed = model.encode_media(torch.cat([pixels[i] for i in order]), [items[i] for i in order])
            assert torch.equal(packed, torch.cat([alone[i] for i in order]))


@torch.no_grad()
def test_position_rows_are_rounded_once_from_fp32():
    """Within half a unit of bf16's last place of the exact value; fp32 sums add some 2^-22 of the largest."""
    model = tiny_keye_model(dtype=torch.bfloat16)
    table = model.visual.position_embedding.double()
    layout = model.visual.layout([MediaGrid("video", (2, 6, 10)), MediaGrid("image", (1, 4, 4))])
    for rows, size in ((layout.positions[:120], (6, 10)), (layout.positions[120:], (4, 4))):
        image = torch.nn.functional.interpolate(table.permute(2, 0, 1)[None], size=size, mode="bilinear")
        frame = image[0].permute(1, 2, 0).flatten(0, 1)
        exact = frame.repeat(len(rows) // len(frame), 1)
        assert ((rows.double() - exact).abs() <= exact.abs() * 2**-8 + table.abs().max() * 2**-22).all()


@torch.no_grad()
def test_tables_are_built_once_per_size(monkeypatch):
    model = tiny_keye_model()
    tower, sizes, interpolate = model.visual, [], ops.interpolate_position
    monkeypatch.setattr(ops, "interpolate_position", lambda table, grid: sizes.append(grid) or interpolate(table, grid))
    for _ in range(2):
        tower.layout([MediaGrid("image", (1, 6, 10)), CLIP, MediaGrid("image", (1, 6, 10))])
    assert sizes == [[1, 6, 10], [1, 4, 6]]


@torch.no_grad()
def test_a_changed_table_is_interpolated_again():
    model = tiny_keye_model()
    items = [MediaGrid("image", (1, 6, 10))]
    before = model.visual.layout(items).positions
    model.visual.position_embedding.add_(1)
    torch.testing.assert_close(model.visual.layout(items).positions, before + 1)
    model.bfloat16()
    assert model.visual.layout(items).positions.dtype == torch.bfloat16


def test_what_inference_cached_serves_training():
    model = tiny_keye_model()
    pixels, items = references.two_photographs()
    with torch.inference_mode():
        expected = model.visual(pixels, items).clone()
    features = model.visual(pixels, items)
    features.sum().backward()
    torch.testing.assert_close(features.detach(), expected)
    assert model.visual.position_embedding.grad.abs().sum() > 0


def test_a_copied_tower_begins_with_empty_caches():
    model = tiny_keye_model()
    with torch.no_grad():
        model.visual.layout([CLIP])
    assert len(model.visual._rotation_cache) == 1
    assert len(copy.deepcopy(model).visual._rotation_cache) == 0


def test_grid_cache_keeps_what_was_used_last_within_its_bytes():
    cache, built = GridCache(1000), []

    def get(key, count=100):
        return cache.get(key, lambda: built.append(key) or (torch.zeros(count),))[0]

    for key in ("a", "b", "a", "c", "a", "b"):  # 400 bytes each: two fit
        get(key)
    assert built == ["a", "b", "c", "b"] and (len(cache), cache.num_bytes) == (2, 800)
    get("huge", 1000)
    get("huge", 1000)
    assert built[4:] == ["huge", "huge"] and (len(cache), cache.num_bytes) == (2, 800)
