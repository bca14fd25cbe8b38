"""The language model against Qwen3, with plain and with sectioned positions."""

from __future__ import annotations

import pytest
import torch

from kvkeye import ops
from kvkeye.layers import PackedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import MediaGrid, mrope_positions
from kvkeye.testing.tiny import tiny_keye_config, tiny_keye_model
from tests.models import references


def text_positions(length: int) -> torch.Tensor:
    return torch.arange(length).expand(3, length).contiguous()


def multimodal_positions() -> torch.Tensor:
    blocks = [(5, MediaGrid("image", (1, 8, 6))), (22, MediaGrid("video", (3, 4, 6), 0.5))]
    return mrope_positions(47, blocks)[0]


def logits(model: KeyeModel, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model.logits(model(embeds, positions, PackedContext.from_lengths([embeds.shape[0]])))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("version", ["preview", "1.5"])
@torch.no_grad()
def test_text(backend, version):
    model = tiny_keye_model(version)
    ids = torch.randint(0, 320, (61,))
    expected = references.language_model(model)(input_ids=ids[None]).logits[0]
    close(logits(model, model.embed(ids), text_positions(61)), expected)


@torch.no_grad()
def test_sectioned_positions(backend):
    model = tiny_keye_model()
    embeds = torch.randn(47, 128) * 0.3
    reference = references.language_model(model)
    plain = reference(inputs_embeds=embeds[None]).logits[0]
    references.inject_positions(reference, model.config.text, multimodal_positions())
    expected = reference(inputs_embeds=embeds[None]).logits[0]
    close(logits(model, embeds, multimodal_positions()), expected)
    assert (plain - expected).abs().max() > 0.01  # the positions matter


@torch.no_grad()
def test_sequences_of_a_pack_do_not_see_each_other(backend):
    model = tiny_keye_model()
    ids = torch.randint(0, 320, (40,))
    positions = torch.cat((text_positions(27), text_positions(13)), 1)
    hidden = model(model.embed(ids), positions, PackedContext.from_lengths([27, 13]))
    for part in (slice(0, 27), slice(27, 40)):
        length = part.stop - part.start
        alone = model(model.embed(ids[part]), positions[:, part], PackedContext.from_lengths([length]))
        if backend == "cpp":
            assert torch.equal(hidden[part], alone)
        else:
            close(hidden[part], alone, 1e-5)


@torch.no_grad()
def test_tied_embeddings(backend):
    torch.manual_seed(2)
    model = KeyeModel(tiny_keye_config(tie_word_embeddings=True))
    ids = torch.randint(0, 320, (9,))
    expected = references.language_model(model)(input_ids=ids[None]).logits[0]
    close(logits(model, model.embed(ids), text_positions(9)), expected)


def test_gradients(backend):
    model = tiny_keye_model()
    reference = references.language_model(model)
    references.inject_positions(reference, model.config.text, multimodal_positions())
    embeds = [torch.randn(47, 128).mul(0.3).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        embeds[1].copy_(embeds[0])
    targets = torch.randint(0, 320, (47,))
    ops.token_logprobs(logits(model, embeds[0], multimodal_positions()), targets).mean().backward()
    expected = torch.log_softmax(reference(inputs_embeds=embeds[1][None]).logits[0], -1)
    expected[torch.arange(47), targets].mean().backward()
    close(embeds[0].grad, embeds[1].grad, 1e-5)
    found = references.hub_gradients(model, "")
    compared = [name for name, parameter in reference.named_parameters() if parameter.grad is not None]
    for name in compared:
        close(found[name], reference.get_parameter(name).grad, 1e-5)
    assert len(compared) == 2 * 11 + 2  # two layers, the last norm and the head


def test_angles_of_sectioned_positions(backend):
    text = tiny_keye_config().text
    positions = torch.stack((torch.arange(300), torch.arange(300) * 7 % 91, torch.arange(300) * 5 % 83))
    cos, sin = references.mrope_table(text)(torch.zeros(1), positions[:, None])  # [1, T, D]
    ones = torch.cat((torch.ones(300, 1, 64), torch.zeros(300, 1, 64)), -1)
    rotated = ops.mrope(ones, positions, list(text.mrope_section), text.rope_theta)[:, 0]
    # 300 radians carry an error of an fp32 ulp of the angle, 3e-5.
    close(rotated[:, :64], cos[0, :, :64], 5e-5)
    close(rotated[:, 64:], sin[0, :, :64], 5e-5)
