"""Packed weights: the same bits as plain ones, one copy at a time, and a state dict that never shows the difference."""

from __future__ import annotations

import copy
import mmap

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.layers import Linear, PackableWeight, PackedContext, pack_weights, quantize_weights
from kvkeye.layers.large_pages import LargePages
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import MediaGrid, mrope_positions
from kvkeye.models.keye.weights import load_model, save_model
from kvkeye.ops import _library
from kvkeye.testing.tiny import tiny_keye_config, tiny_keye_model
from tests.models.paged import PagedRun

pytestmark = pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)
DTYPES = (torch.float32, torch.bfloat16)


def tied_model(dtype: torch.dtype) -> KeyeModel:
    torch.manual_seed(3)
    return KeyeModel(tiny_keye_config(tie_word_embeddings=True)).to(dtype).eval()


@torch.no_grad()
def results(model: KeyeModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(48, 588, generator=generator).to(model.dtype)
    ids = torch.randint(0, 256, (30,), generator=generator)
    embeds = model.embed(ids)
    hidden = model(embeds, mrope_positions(30, [])[0], PackedContext.from_lengths([30]))
    return [model.encode_media(pixels, [MediaGrid("image", (1, 8, 6))]), embeds, model.logits(hidden)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_same_bits(dtype: torch.dtype, tied: bool) -> None:
    model = tied_model(dtype) if tied else tiny_keye_model(dtype=dtype)
    with ops.use_backends("cpp"):
        plain = results(model)
        assert pack_weights(model) == 20  # tower 1 + 2 * 4, projector 2, decoder 2 * 4, head 1
        assert all(torch.equal(a, b) for a, b in zip(results(model), plain, strict=True))


@pytest.mark.parametrize("form", ["packed", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_layer_as_one_op_and_in_parts(dtype: torch.dtype, form: str) -> None:
    """The same bits, in the caches too, for prompts and for decoding."""
    model = tiny_keye_model(dtype=dtype)
    if form == "int8":
        quantize_weights(model.language)
    pack_weights(model)
    found = []
    for in_parts in (False, True):
        for layer in model.language.layers:
            layer.in_parts = in_parts
        torch.manual_seed(2)
        run, outputs = PagedRun(model, batch=2, max_len=60), []
        for start, counts in ((0, (33, 7)), (33, (1, 1)), (34, (3, 1))):
            ids = [torch.randint(0, 256, (count,)) for count in counts]
            positions = [mrope_positions(start + count, [])[0][:, start:] for count in counts]
            outputs += run.step([model.embed(i) for i in ids], positions)
        found.append([*outputs, *(cache.nan_to_num() for cache in (*run.k_caches, *run.v_caches))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_copy_at_a_time() -> None:
    model = tiny_keye_model()
    before = sum(p.numel() for p in model.parameters())
    pack_weights(model)
    plain = sum(p.numel() for p in model.parameters())
    packed = sum(b.numel() for b in model.buffers())
    assert plain < before / 4 and plain + packed < before * 1.2  # panels are filled up to 64 outputs
    assert pack_weights(model) == 0
    for module in model.modules():
        if isinstance(module, PackableWeight):
            module.unpack()
    assert sum(p.numel() for p in model.parameters()) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_is_plain(dtype: torch.dtype, tmp_path) -> None:
    model = tiny_keye_model(dtype=dtype)
    expected = copy.deepcopy(model.state_dict())
    pack_weights(model)
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_changed_weight_is_packed_again() -> None:
    model, other = tiny_keye_model(seed=1), tiny_keye_model(seed=2)
    with ops.use_backends("cpp"):
        pack_weights(model)
        model.load_state_dict(other.state_dict())
        assert model.language.layers[0].mlp.down_proj.weight is None
        assert all(torch.equal(a, b) for a, b in zip(results(model), results(other), strict=True))


def test_a_moved_module_is_plain_again() -> None:
    layer = Linear(40, 70)
    weight = layer.weight.detach().clone()
    layer.pack()
    assert layer.weight is None and torch.equal(layer.plain_weight(), weight)
    layer.to(torch.bfloat16)
    assert layer.packed is None and torch.equal(layer.weight, weight.bfloat16())


def test_packed_weights_do_not_learn() -> None:
    layer = Linear(8, 8)
    layer.pack()
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 8, requires_grad=True))


def test_other_backends_keep_plain_weights() -> None:
    model = tiny_keye_model()
    with ops.use_backends("eager"):
        assert pack_weights(model) == 0


def test_large_pages_hold_equal_copies_side_by_side() -> None:
    memory = LargePages()
    given = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.arange(9, dtype=torch.uint8), torch.empty(0, 4)]
    copies = [memory.copy(tensor) for tensor in given]
    assert all(torch.equal(copy, tensor) and copy.is_contiguous() for copy, tensor in zip(copies, given))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        first, second, third, _ = (copy.data_ptr() for copy in copies)
        assert first % (2 << 20) == 0
        assert (second - first, third - second) == (64, 64)


def test_large_pages_give_zeros_of_their_own() -> None:
    memory, cpu = LargePages(), torch.device("cpu")
    shapes: list[tuple[int, ...]] = [(2, 3), (0, 4), (5,), (40 << 20,)]  # the last one is larger than a segment
    given = [memory.zeros(shape, dtype, cpu) for shape, dtype in zip(shapes, [torch.bfloat16, torch.float32] * 2)]
    for i, tensor in enumerate(given):
        assert tensor.shape == shapes[i] and not tensor[:1000].any()
        tensor[:1000].fill_(i + 1)
    assert all((tensor[:1000] == i + 1).all() for i, tensor in enumerate(given))
    assert memory.zeros((2,), torch.float32, torch.device("meta")).is_meta
