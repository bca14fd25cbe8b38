"""The tiny video pipelines: clips, measures and training of a few steps; trained folders have scores of their own."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from kvkeye.cli import main
from kvkeye.errors import ConfigError
from kvkeye.train.clips.motion import DIRECTIONS, SHAPES, SPEEDS, Motion, draw, measure, vocabulary
from kvkeye.train.clips.recipe import load
from kvkeye.train.clips.trainer import VideoTrainer, run
from kvkeye.video.attention import TileSelfAttention, use_kvkeye_attention

SMALL = """
kind = "video"
name = "small"
output = "{output}"
num_frames = 5
size = 16
text_dim = 16
sampling_steps = 2
save_every = 1
report_every = 1
[vae]
steps = 3
batch = 2
base_dim = 4
z_dim = 4
[t2v]
steps = 3
batch = 2
layers = 1
heads = 1
head_dim = 12
ffn = 16
[i2v]
steps = 2
batch = 2
layers = 1
heads = 1
head_dim = 12
ffn = 16
[optimizer]
lr = 1e-3
warmup = 1
decay = 1
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL.format(output=tmp_path / "out"))
    return path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_clip_scores_as_what_it_is_and_any_other_motion_does_not(shape, direction):
    own = Motion("blue", shape, "quickly", direction, 3.3, 20.1)
    frames = own.frames(64)  # twice around the frame
    found = measure(frames, own)
    assert found.position < 0.15 and found.velocity < 0.02 and found.color < 0.02 and found.presence == 1
    other = next(name for name in DIRECTIONS if name != direction)
    assert measure(frames, Motion("blue", shape, "quickly", other, 0, 0)).position > 3
    assert measure(frames, Motion("blue", shape, "slowly", direction, 0, 0)).velocity > 0.4
    assert measure(frames, Motion("red", shape, "quickly", direction, 0, 0)).color > 0.5


def test_motion_wraps_around_the_frame():
    own = Motion("red", "disc", "quickly", "right", 1.0, 16.0)
    frames = own.frames(33)
    torch.testing.assert_close(frames[32], frames[0], atol=1e-5, rtol=0)
    assert frames[0, 0, 16, 31] > 0.5, "the disc at the left edge shows at the right one too"


def test_measures_see_a_jump_fading_colour_and_absence():
    own = Motion("red", "disc", "slowly", "right", 8, 8)
    frames = own.frames(40)
    jumped = torch.cat([frames[:20], frames[20:].roll(8, -1)])
    assert measure(jumped, own).position > 3.5
    fading = frames * torch.linspace(1, 0.6, 40).view(-1, 1, 1, 1)
    assert measure(fading, own).drift > 0.15 > abs(measure(frames, own).drift)
    gone = frames.clone()
    gone[30:] = 0.12
    assert measure(gone, own).presence == 0.75
    assert measure(torch.full((8, 3, 32, 32), 0.12), own).presence == 0


def test_captions_say_everything_but_the_place_and_seeds_repeat():
    assert draw(5) == draw(5) and draw(5) != draw(6)
    words = set(vocabulary())
    captions = {draw(seed).prompt for seed in range(300)}
    assert all(set(caption.split()) <= words for caption in captions) and len(captions) > 150
    assert {draw(seed).speed for seed in range(50)} == set(SPEEDS)


def test_a_short_run_gives_two_folders_that_sample(recipe, tmp_path, capsys):
    """Smoke: three stages through the command line and the project's attention, then a clip from a folder."""
    assert main(["train", str(recipe)]) == 0
    told = capsys.readouterr().err
    assert "vae 3/3" in told and "t2v 3/3" in told and "i2v 2/2" in told
    folder, out = tmp_path / "out" / "small-t2v", tmp_path / "clip.mp4"
    words = ["video", "a red disc moves slowly left", "--pipeline", str(folder), "--out", str(out), "--seconds", "2"]
    assert main(words) == 0 and out.exists(), capsys.readouterr().err
    assert (tmp_path / "out" / "small-i2v" / "model_index.json").exists()


def test_an_interrupted_run_continues_to_the_same_bits(recipe):
    whole = VideoTrainer(load(recipe))
    for _ in range(3):
        whole.train_step()
    whole.finish_stage()
    whole.train_step()
    saved = whole.state_dict()
    copy = VideoTrainer(load(recipe))
    copy.load_state_dict(deepcopy(saved))  # as a file would hold it
    assert (copy.stage, copy.step) == ("t2v", 1)
    first, again = whole.train_step(), copy.train_step()
    assert first == again
    for a, b in zip(whole.parts["t2v"].parameters(), copy.parts["t2v"].parameters()):
        assert torch.equal(a, b)


def test_losses_fall_through_the_projects_attention(recipe):
    trainer = VideoTrainer(load(recipe, {"t2v.batch": 8, "t2v.steps": 60, "optimizer.lr": 5e-3}), use_kvkeye_attention)
    assert all(isinstance(block.attn1.processor, TileSelfAttention) for block in trainer.parts["t2v"].blocks)
    trainer.finish_stage()
    losses = [trainer.train_step()["flow"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_the_guide_model_begins_as_the_text_model(recipe):
    trainer = VideoTrainer(load(recipe))
    trainer.finish_stage()
    trainer.train_step()
    trainer.finish_stage()
    assert trainer.stage == "i2v"
    _, clips = trainer._clips("i2v", 0)
    x = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(2, 16, 16)
    time = torch.tensor([500.0, 500.0])
    with torch.no_grad():
        plain = trainer.parts["t2v"](x, time, text).sample
        guided = trainer.parts["i2v"](torch.cat([x, trainer._condition(clips)], 1), time, text).sample
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-5)


def test_unusable_recipes(recipe):
    with pytest.raises(ConfigError, match="4 n \\+ 1 frames"):
        load(recipe, {"num_frames": 6})
    with pytest.raises(ConfigError, match="speed unknown"):
        load(recipe, {"t2v.speed": 6})
    with pytest.raises(ConfigError, match="layer"):
        run(recipe, {"vae.layer": 1})
