"""The tiny video pipelines: clips, measures and training of a few steps; trained folders have scores of their own."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from kvkeye.cli import main
from kvkeye.errors import ConfigError
from kvkeye.train.__main__ import main as evaluate_main
from kvkeye.train.clips.evaluate import held_out, score
from kvkeye.train.clips.latents import encode, guide_clips, splice, with_mask
from kvkeye.train.clips.measures import Recognised, measure, recognise
from kvkeye.train.clips.models import without_guide
from kvkeye.train.clips.motion import DIRECTIONS, SHAPES, SPEEDS, Motion, draw, vocabulary
from kvkeye.train.clips.recipe import load
from kvkeye.train.clips.trainer import VideoTrainer, run
from kvkeye.video.attention import TileSelfAttention, use_kvkeye_attention

SMALL = """
kind = "video"
name = "small"
output = "{output}"
pool = 8
num_frames = 5
size = 16
text_dim = 16
sampling_steps = 2
save_every = 1
report_every = 1
[vae]
steps = 3
batch = 2
num_frames = 5
base_dim = 4
z_dim = 4
[denoiser]
steps = 3
batch = 2
layers = 1
heads = 1
head_dim = 12
ffn = 16
[optimizer]
warmup = 1
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
    frames = own.frames(64)  # three times around the frame
    found = measure(frames, own)
    assert found.position < 0.2 and found.velocity < 0.02 and found.color < 0.02 and found.presence == 1
    assert found.identity == 1 and recognise(frames, own) == Recognised("blue", shape, "quickly", direction)
    other = next(name for name in DIRECTIONS if name != direction)
    assert measure(frames, Motion("blue", shape, "quickly", other, 0, 0)).position > 3
    assert measure(frames, Motion("blue", shape, "slowly", direction, 0, 0)).velocity > 0.4
    assert measure(frames, Motion("red", shape, "quickly", direction, 0, 0)).color > 0.5


def test_motion_wraps_around_the_frame():
    own = Motion("red", "disc", "quickly", "right", 1.0, 16.0)
    frames = own.frames(65)
    torch.testing.assert_close(frames[64], frames[0], atol=1e-4, rtol=0)
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
    empty = torch.full((8, 3, 32, 32), 0.12)
    assert measure(empty, own).presence == 0 and recognise(empty, own) is None
    changed = torch.cat([frames[:20], Motion("red", "ring", "slowly", "right", 18, 8).frames(20)])
    assert measure(changed, own).identity == 0.5 and measure(changed, own).position < 0.5


def test_a_placed_motion_counts_from_its_own_place():
    own = Motion("green", "cross", "slowly", "up", 8, 8)
    moved = Motion("green", "cross", "slowly", "up", 12, 8).frames(20)
    assert measure(own.frames(20), own, placed=True).position < 0.15
    assert measure(moved, own).position < 0.15
    assert measure(moved, own, placed=True).position == pytest.approx(4, abs=0.2)


def test_captions_say_everything_but_the_place_and_seeds_repeat():
    assert draw(5) == draw(5) and draw(5) != draw(6)
    words = set(vocabulary())
    captions = {draw(seed).prompt for seed in range(300)}
    assert all(set(caption.split()) <= words for caption in captions) and len(captions) > 150
    assert {draw(seed).speed for seed in range(50)} == set(SPEEDS)


def test_a_short_run_gives_two_folders_that_sample(recipe, tmp_path, capsys):
    """Smoke: all stages through the command line and the project's attention, then a clip from a folder."""
    assert main(["train", str(recipe)]) == 0
    told = capsys.readouterr().err
    assert "vae 3/3" in told and "denoiser 3/3" in told
    folder, out = tmp_path / "out" / "small-t2v", tmp_path / "clip.mp4"
    words = ["video", "a red disc moves slowly left", "--pipeline", str(folder), "--out", str(out), "--seconds", "2"]
    assert main(words) == 0 and out.exists(), capsys.readouterr().err
    assert (tmp_path / "out" / "small-i2v" / "model_index.json").exists()


@pytest.mark.parametrize("stage", ["t2v", "i2v"])
def test_a_folder_is_scored_and_gets_its_card(recipe, tmp_path, capsys, stage):
    run(recipe)
    folder = tmp_path / "out" / f"small-{stage}"
    evaluate_main(["evaluate", str(folder), "count=3", "card=true"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| small-{stage}")]
    assert len(lines) == 2 and all(line in (folder / "README.md").read_text() for line in lines)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores[f"small-{stage}"]["clips"] == 3 and scores["VAE of true clips"]["presence"] <= 1


def test_true_clips_score_fully_and_wrong_ones_by_word():
    motions = held_out(6)
    clips = [motion.frames(17) for motion in motions]
    found = score([*zip(clips, motions)], placed=True)
    assert (found.all_right, found.identity, found.presence) == (1, 1, 1) and found.position < 0.2
    other = {"left": "right"}
    turned = [replace(motion, direction=other.get(motion.direction, "left")) for motion in motions]
    wrong = score([*zip(clips, turned)], placed=True)
    assert wrong.direction_right == wrong.all_right == 0 and wrong.color_right == wrong.shape_right == 1
    assert not {motion.prompt for motion in motions} <= {motion.prompt for motion in held_out(6, seed=1)}


def test_an_interrupted_run_continues_to_the_same_bits(recipe):
    whole = VideoTrainer(load(recipe))
    for _ in range(3):
        whole.train_step()
    whole.finish_stage()
    whole.train_step()
    saved = whole.state_dict()
    copy = VideoTrainer(load(recipe))
    copy.load_state_dict(deepcopy(saved))  # as a file would hold it
    assert (copy.stage, copy.step) == ("denoiser", 1)
    first, again = whole.train_step(), copy.train_step()
    assert first == again
    for a, b in zip(whole.parts["denoiser"].parameters(), copy.parts["denoiser"].parameters()):
        assert torch.equal(a, b)


def test_losses_fall_through_the_projects_attention(recipe):
    trainer = VideoTrainer(
        load(recipe, {"denoiser.batch": 8, "denoiser.steps": 60, "denoiser.lr": 5e-3, "pool": 64}), use_kvkeye_attention
    )
    assert all(isinstance(block.attn1.processor, TileSelfAttention) for block in trainer.parts["denoiser"].blocks)
    trainer.finish_stage()
    losses = [trainer.train_step()["flow"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_text_to_video_is_the_denoiser_without_a_guide(recipe):
    trainer = VideoTrainer(load(recipe))
    _, clips = trainer._clips("pool", 0, 2)
    condition = with_mask(encode(trainer.parts["vae"], guide_clips(clips)))
    x = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    text, time = torch.zeros(2, 16, 16), torch.tensor([500.0, 500.0])
    guided, plain = trainer.parts["denoiser"], without_guide(trainer.recipe, trainer.parts["denoiser"])
    with torch.no_grad():
        alone = plain(x, time, text).sample
        unguided = guided(torch.cat([x, 0 * condition], 1), time, text).sample
        seen = guided(torch.cat([x, condition], 1), time, text).sample
    torch.testing.assert_close(unguided, alone, rtol=0, atol=1e-5)
    assert (seen - alone).abs().max() > 1e-3


def test_joined_clips_are_beginnings_and_ends_of_clips(recipe):
    """Each frame and each latent is one of a clip of the batch; what follows a joint may be encoded from there on."""
    trainer = VideoTrainer(load(recipe))
    vae, clips = trainer.parts["vae"], trainer._clips("vae", 0, 3, 9)[1]
    whole, kinds = vae.encode(clips).latent_dist.mode(), set()
    for seed in range(24):
        joined, latents = splice(vae, clips, torch.Generator().manual_seed(seed))
        assert joined.shape == clips.shape and latents.shape == whole.shape
        at = next((i for i in range(9) if torch.equal(joined[:, :, i:], clips[:, :, i:])), 9)
        assert any(torch.equal(joined[:, :, :at], clips.roll(shift, 0)[:, :, :at]) for shift in (0, 1))
        assert any(torch.equal(latents[:, :, 0], whole.roll(shift, 0)[:, :, 0]) for shift in (0, 1))
        last = [
            torch.equal(latents[:, :, -1], end[:, :, -1])
            for end in (whole, vae.encode(clips[:, :, 8:]).latent_dist.mode())
        ]
        kinds.add((at > 0, *last))
    assert (False, True, False) in kinds and (True, True, False) in kinds and len(kinds) >= 3


def test_unusable_recipes(recipe):
    with pytest.raises(ConfigError, match="4 n \\+ 1 frames"):
        load(recipe, {"num_frames": 6})
    with pytest.raises(ConfigError, match="speed unknown"):
        load(recipe, {"denoiser.speed": 6})
    with pytest.raises(ConfigError, match="layer"):
        run(recipe, {"vae.layer": 1})
