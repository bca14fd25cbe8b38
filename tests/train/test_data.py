"""Batches: what training sees is what serving renders, and packing changes nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from kvkeye import ops
from kvkeye.errors import ConfigError
from kvkeye.models.keye.processor import KeyeProcessor
from kvkeye.train.data import ChatEncoder, Mixture, batch, grid_of, media_of, pack, pack_single, questions_of
from kvkeye.train.losses import answer_logits, next_token_loss
from kvkeye.train.questions import Turn, ask
from kvkeye.train.render import render
from kvkeye.train.scenes import Kind, sample_scene
from kvkeye.train.tokenizer import build_tokenizer
from tests.train.tiny import exported, small_model

ENCODER = ChatEncoder(build_tokenizer())
NO_TEXT = {"objects": 0.7, "clip": 0.3}  # needs no fonts


def test_a_batch_is_a_function_of_seed_step_and_rank() -> None:
    mixture = Mixture(NO_TEXT, images=3)
    one, same, other = (batch(mixture, ENCODER, 1, step, rank) for step, rank in ((5, 0), (5, 0), (5, 1)))
    for f in fields(one):
        a, b = getattr(one, f.name), getattr(same, f.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("kind", ["objects", "clip"])
@pytest.mark.parametrize("mode", [None, "no_think"])
def test_training_sees_what_serving_renders(kind: Kind, mode: str | None, tmp_path: Path) -> None:
    """Token ids, positions, grids and pixels of a chat equal the processor's for the same messages."""
    processor = KeyeProcessor.from_folder(exported(tmp_path))
    scene = sample_scene(11, kind)
    import random

    rng = random.Random(0)
    turns = [turn for task in ("count", "background", "describe") if (turn := ask(scene, task, rng))]
    suffix = "" if mode is None else "/" + mode
    asked = [*turns[:-1], Turn(turns[-1].task, turns[-1].question + suffix, turns[-1].answer)]
    media = media_of(scene)
    chat = ENCODER.chat(asked, media)
    frames = render(scene)
    item = {"type": "video", "video": frames} if kind == "clip" else {"type": "image", "image": frames[0]}
    messages = []
    for i, turn in enumerate(turns):
        content = [*([item] if i == 0 else []), {"type": "text", "text": turn.question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.answer}]
    prompt = processor.process(messages[:-1], mode)
    last = chat.answers[-1][0]
    assert chat.ids[:last] == prompt.token_ids
    packed = pack([media], [chat])
    assert torch.equal(packed.positions[:, :last], prompt.positions)
    assert packed.positions[0, last] == last + prompt.position_delta
    assert prompt.media[0].blocks == [grid_of(media)]
    torch.testing.assert_close(packed.pixel_values(torch.float32), prompt.media[0].pixel_values, rtol=0, atol=1e-6)


def test_targets_are_the_answers_and_their_end() -> None:
    scene = sample_scene(2, "objects")
    turns = [Turn("color", "What color is the star?", "red"), Turn("count", "Count the objects.", "3")]
    data = pack([media_of(scene)], [ENCODER.chat(turns, media_of(scene))])
    end = ENCODER.end
    assert [ENCODER.decode([t]) for t in data.targets.tolist() if t != end] == ["red", "3"]
    assert data.targets.tolist().count(end) == 2 and data.turn_of.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.ids[data.rows + 1], data.targets)  # each row predicts the token after it


@pytest.mark.parametrize("backends", ["eager", "cpp,eager"])
def test_packed_loss_is_the_sum_of_single_losses(backends: str) -> None:
    """Samples of one pack do not see each other."""
    model = small_model()
    items = questions_of("count", 4, "train") + questions_of("motion", 2, "train")
    with torch.no_grad(), ops.use_backends(backends):
        together = pack_single(items, ENCODER)
        logits = answer_logits(model, together)[0]
        singles = [pack_single([item], ENCODER) for item in items]
        rows = torch.cat([answer_logits(model, single)[0] for single in singles])
        losses = sum(next_token_loss(answer_logits(model, s)[0], s) * len(s.targets) for s in singles)
        torch.testing.assert_close(logits, rows, rtol=0, atol=2e-5)
        torch.testing.assert_close(next_token_loss(logits, together) * len(together.targets), losses)


def test_held_out_questions_are_single_and_from_held_out_scenes() -> None:
    for scene, turn in questions_of("position", 20, "held_out"):
        assert int(scene.digest()[:2], 16) < 26 and turn.task == "position"


@pytest.mark.parametrize("kinds", [{}, {"objects": -1.0}, {"objects": 0.0}, {"photos": 1.0}])
def test_a_bad_mixture_is_refused(kinds: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="kinds"):
        Mixture(kinds)
