"""A whole multimodal prompt against the public parts put together by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvkeye.layers import PackedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.positions import mrope_positions
from kvkeye.testing.tiny import tiny_keye_config, tiny_keye_model
from tests.models import references


@torch.no_grad()
def test_two_photographs_and_a_question(backend):
    model = tiny_keye_model()
    pixels, items = references.two_photographs()
    ids = torch.randint(0, 256, (70,))
    starts = (4, 40)  # 24 and 15 tokens
    rows = torch.cat([torch.arange(s, s + item.num_tokens()) for s, item in zip(starts, items)])
    positions, delta = mrope_positions(70, list(zip(starts, items)))
    hidden = model(
        model.embed(ids, model.encode_media(pixels, items), rows), positions, PackedContext.from_lengths([70])
    )

    grid = references.grid_tensor(items)
    features = references.vision_tower(model)(references.as_images(pixels), grid_thw=grid).last_hidden_state
    media = references.projector(model)(features.view(-1, 144), grid)
    reference = references.language_model(model)
    embeds = reference.model.embed_tokens(ids)
    embeds[rows] = media
    references.inject_positions(reference, model.config.text, positions)
    expected = reference(inputs_embeds=embeds[None]).logits[0]
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    assert delta == positions.max() + 1 - 70


@torch.no_grad()
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_real_head_counts(backend, version):
    """Sixteen heads of 72 and grouped heads of 128 in the 4:1 ratio of the 8B checkpoints."""
    config = tiny_keye_config(version, num_layers=1)
    vision = replace(config.vision, hidden_size=1152, num_attention_heads=16, image_size=384)
    text = replace(config.text, num_attention_heads=8, num_key_value_heads=2)
    torch.manual_seed(3)
    model = KeyeModel(replace(config, vision=vision, text=text))
    pixels, items = references.two_photographs()
    tower = references.vision_tower(model)(references.as_images(pixels), grid_thw=references.grid_tensor(items))
    torch.testing.assert_close(model.visual(pixels, items), tower.last_hidden_state, atol=1e-4, rtol=1e-4)
    ids = torch.randint(0, 256, (33,))
    positions = torch.arange(33).expand(3, 33).contiguous()
    logits = model.logits(model(model.embed(ids), positions, PackedContext.from_lengths([33])))
    expected = references.language_model(model)(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
