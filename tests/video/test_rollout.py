"""Chunk rollout on tiny random pipelines: oracle (h), and the defects of the published code avoided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvkeye.errors import ConfigError
from kvkeye.video import VideoCancelled
from kvkeye.video.config import KStepConfig
from kvkeye.video.rollout import Chunk, ChunkRollout
from kvkeye.video.scorers import Candidate, GuideScore, JudgeScore, WeightedScore
from tests.video import tiny


def cogvideox_call(**changes: Any) -> dict[str, Any]:
    return tiny.cogvideox_call(9, **changes)


def svd_call(**changes: Any) -> dict[str, Any]:
    call = tiny.svd_call(4, **changes)
    call.pop("image")
    return call


def wan_call(**changes: Any) -> dict[str, Any]:
    return tiny.wan_call(9, **changes)


def hunyuan_call(**changes: Any) -> dict[str, Any]:
    return tiny.hunyuan_call(9, **changes)


def dpm() -> Any:
    from diffusers import CogVideoXDPMScheduler

    return CogVideoXDPMScheduler()


def stochastic() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)


FAMILIES = {
    "wan": (tiny.wan_i2v, wan_call),
    "wan-unipc": (lambda: tiny.wan_i2v(tiny.unipc()), wan_call),
    "wan-clip": (
        lambda: tiny.wan_i2v(clip=True),
        lambda: wan_call(prompt_embeds=tiny.text(512, 32), negative_prompt_embeds=tiny.text(512, 32, 4)),
    ),
    "cogvideox": (tiny.cogvideox_i2v, cogvideox_call),
    "cogvideox-dpm": (lambda: tiny.cogvideox_i2v(dpm()), cogvideox_call),
    "hunyuan-concat": (lambda: tiny.hunyuan_i2v("latent_concat"), hunyuan_call),
    "hunyuan-replace": (lambda: tiny.hunyuan_i2v("token_replace"), hunyuan_call),
    "svd": (tiny.svd, svd_call),
}


def made(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    make, call = FAMILIES[name]
    arguments = call() | {"num_inference_steps": 4} | changes
    return make(), {k: v for k, v in arguments.items() if k not in ("generator", "output_type")}


def rolled(pipe: Any, call: dict[str, Any], chunks: int = 1, scorer: Any = None, **settings: Any) -> list[Chunk]:
    return list(ChunkRollout(pipe, KStepConfig(**settings), scorer).run(tiny.picture(), chunks, call))


def plain(pipe: Any, call: dict[str, Any], seed: int, image: Any = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = tiny.picture() if image is None else image
    frames: torch.Tensor = pipe(**call, image=image, generator=generator, output_type="pt").frames[0]
    return frames


# SVD's and Wan's CLIP see a float picture through the rollout only; their plain runs need the 8-bit way.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("svd", "wan-clip")])
def test_one_candidate_is_the_plain_run_bit_for_bit(name):
    """Oracle (h)."""
    pipe, call = made(name)
    (chunk,) = rolled(pipe, call, num_candidates=1)
    assert torch.equal(chunk.frames, plain(pipe, call, chunk.seeds[0])) and chunk.cost.steps == 4
    assert chunk.cost.saved == 0 and chunk.scores == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_winner_continues_to_the_bits_of_its_plain_run(name):
    """Truncated search: solver history and noise states are the winner's own, whichever it is."""
    pipe, call = made(name)
    for choice in (0, 2):
        (chunk,) = rolled(pipe, call, scorer=prefer(choice), num_candidates=3, k=2)
        assert chunk.chosen == chunk.seeds[choice] and len(chunk.scores) == 3
        (alone,) = rolled_with(pipe, call, chunk.chosen)
        assert torch.equal(chunk.frames, alone.frames)
        assert (chunk.cost.steps, chunk.cost.saved) == (3 * 2 + 2, 2)


def prefer(choice: int) -> Any:
    return lambda candidates: [{"score": float(i == choice)} for i in range(len(candidates))]


def rolled_with(pipe: Any, call: dict[str, Any], seed: int) -> list[Chunk]:
    rollout = ChunkRollout(pipe, KStepConfig(num_candidates=1))
    with rollout.adapter.sharing(pipe):
        guide = rollout._as_guide(tiny.picture(), call)
        return [rollout._chunk(0, guide, (seed,), dict(call))]


def test_schedulers_that_draw_noise_draw_the_same_for_the_winner():
    pipe, call = made("wan")
    pipe.scheduler = stochastic()
    (chunk,) = rolled(pipe, call, scorer=prefer(1), num_candidates=3, k=2)
    (other,) = rolled(pipe, call, scorer=prefer(1), num_candidates=3, k=3)
    assert torch.equal(chunk.frames, other.frames)


def test_coarse_search_as_published():
    """k-step schedules of their own, decoded; the winner starts anew with the same noise."""
    pipe, call = made("wan")
    seen: list[Candidate] = []

    def scorer(candidates):
        seen.extend(candidates)
        return [{"score": float(i == 1)} for i in range(len(candidates))]

    (chunk,) = rolled(pipe, call, scorer=scorer, num_candidates=3, k=2, search="coarse")
    assert torch.equal(chunk.frames, plain(pipe, call, chunk.seeds[1])) and chunk.chosen == chunk.seeds[1]
    coarse = plain(pipe, call | {"num_inference_steps": 2}, chunk.seeds[2])
    assert torch.equal(seen[2].decode(), coarse)
    assert (chunk.cost.steps, chunk.cost.saved, chunk.cost.decodes) == (3 * 2 + 4, 0, 3)


def test_successive_halving_costs_what_it_should():
    pipe, call = made("wan", num_inference_steps=6)
    (chunk,) = rolled(pipe, call, num_candidates=8, halving=(1, 2, 4))
    assert [score["step"] for score in chunk.scores] == [1] * 8 + [2] * 4 + [4] * 2
    assert chunk.cost.steps == 8 + 4 + 4 + 2 and chunk.cost.saved == 8 * 4 + 6 - 18
    assert chunk.cost.decodes == 0


@pytest.mark.parametrize("name", ["wan", "wan-unipc", "wan-clip", "cogvideox", "hunyuan-concat", "svd"])
def test_candidates_in_one_batch_choose_alike(name):
    """Batched candidates have the noises of single ones; torch's products differ in the last bits."""
    pipe, call = made(name)
    single = rolled(pipe, call, num_candidates=4, k=2)[0]
    together = rolled(pipe, call, num_candidates=4, k=2, candidate_batch=4)[0]
    assert together.seeds == single.seeds and together.chosen == single.chosen
    torch.testing.assert_close(together.frames, single.frames, rtol=0, atol=2e-3)
    assert together.cost.steps == single.cost.steps


def test_chunks_follow_each_other_without_a_doubled_frame():
    pipe, call = made("wan")
    chunks = rolled(pipe, call, 3, num_candidates=2, k=1)
    assert [len(chunk.frames) for chunk in chunks] == [9, 8, 8]
    kept = rolled(pipe, call, 3, num_candidates=2, k=1, drop_guide=False)
    assert [len(chunk.frames) for chunk in kept] == [9, 9, 9]
    assert torch.equal(kept[1].frames[1:], chunks[1].frames)
    assert len({seed for chunk in chunks for seed in chunk.seeds}) == 6


def test_the_guide_stays_in_float():
    """Published: the guide frame passes through 8 bits between chunks."""
    pipe, call = made("wan")
    first, second = rolled(pipe, call, 2, num_candidates=1)
    assert torch.equal(second.frames, plain(pipe, call, second.seeds[0], first.frames[-1:])[1:])
    eight_bit = (first.frames[-1:] * 255).round() / 255
    assert not torch.equal(second.frames, plain(pipe, call, second.seeds[0], eight_bit)[1:])


def test_seeds_come_from_one_generator_and_runs_repeat():
    """Published: candidate noise without a seed."""
    pipe, call = made("wan")
    torch.manual_seed(1)
    first = rolled(pipe, call, 2, num_candidates=3, k=1, seed=5)
    torch.manual_seed(2)
    again = rolled(pipe, call, 2, num_candidates=3, k=1, seed=5)
    assert all(torch.equal(a.frames, b.frames) and a.scores == b.scores for a, b in zip(first, again))
    assert rolled(pipe, call, 1, num_candidates=3, k=1, seed=6)[0].seeds != first[0].seeds


def test_encodings_are_shared_by_the_candidates_of_a_chunk():
    """Published: text and guide are encoded for every candidate anew."""
    pipe, call = made("wan-clip")
    calls: list[str] = []
    pipe.vae.encoder.register_forward_pre_hook(lambda m, a: calls.append("vae"))
    pipe.image_encoder.register_forward_pre_hook(lambda m, a: calls.append("clip"))
    rolled(pipe, call, num_candidates=4, k=1)
    # three blocks of the clip's condition, and one frame for the scorer
    assert calls.count("clip") == 1 and calls.count("vae") == 3 + 1
    assert "encode" not in vars(pipe.vae) and "encode_prompt" not in vars(pipe)


def test_color_anchor_pulls_later_chunks_to_the_first():
    pipe, call = made("wan")
    free = rolled(pipe, call, 3, num_candidates=1)
    pulled = rolled(pipe, call, 3, num_candidates=1, color_anchor=1.0)
    assert torch.equal(free[0].frames, pulled[0].frames)

    def gap(chunk: Chunk, first: Chunk) -> float:
        return float((chunk.latents.mean((0, 2, 3, 4)) - first.latents.mean((0, 2, 3, 4))).abs().max())

    assert gap(pulled[1], pulled[0]) < 1e-5 < gap(free[1], free[0])
    assert not torch.equal(free[1].frames, pulled[1].frames)


def candidate(frames: torch.Tensor, seed: int = 0) -> Candidate:
    return Candidate(seed, frames.transpose(0, 1), frames[0], frames[0], lambda: frames)


@pytest.mark.parametrize("on", ["latents", "pixels"])
def test_the_motion_floor_rejects_a_frozen_candidate(on):
    """Bias of the published score: the smallest similarity is largest for a frozen clip."""
    still = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).expand(6, 3, 8, 8).clone()
    moving = torch.stack([still[0].roll(i, -1) for i in range(6)])
    frozen, alive = GuideScore(on=on)([candidate(still), candidate(moving)])
    assert frozen["similarity"] > alive["similarity"] and frozen["score"] < alive["score"]
    frozen, alive = GuideScore(on=on, motion_floor=0.0)([candidate(still), candidate(moving)])
    assert frozen["score"] > alive["score"]


def test_weighted_terms_and_a_judge():
    bright = candidate(torch.full((3, 3, 8, 8), 0.9))
    dark = candidate(torch.full((3, 3, 8, 8), 0.1))
    judge = JudgeScore(lambda frames: float(frames.mean()))
    both = WeightedScore({"judge": (2.0, judge), "dark": (0.5, JudgeScore(lambda frames: -float(frames.mean())))})
    assert [round(term["score"], 4) for term in judge([bright, dark])] == [0.9, 0.1]
    assert round(both([bright])[0]["score"], 4) == round(2 * 0.9 - 0.5 * 0.9, 4)
    assert {"judge/score", "dark/score"} <= both([bright])[0].keys()
    drift = GuideScore(motion_floor=0.0, drift_weight=1.0)
    fading = torch.linspace(0, 1, 4).view(4, 1, 1, 1) * torch.ones(4, 3, 8, 8)
    assert drift([candidate(fading)])[0]["drift"] > 0.9


@pytest.mark.parametrize(("name", "done"), [("wan-unipc", 2), *((name, 3) for name in FAMILIES)])
def test_an_interrupted_rollout_continues_to_the_same_bits(name, done, tmp_path):
    pipe, call = made(name)
    config = KStepConfig(num_candidates=3, k=1, color_anchor=0.5)
    whole = list(ChunkRollout(pipe, config).run(tiny.picture(), 2, call))
    steps = []

    def stop(chunk: int, what: str, step: int) -> bool:
        steps.append((chunk, what, step))
        return (chunk, what, step) != (1, "chunk", done)

    with pytest.raises(VideoCancelled, match=f"chunk 1 after step {done}"):
        list(ChunkRollout(pipe, config, folder=tmp_path, on_step=stop).run(tiny.picture(), 2, call))
    resumed = []
    again = ChunkRollout(pipe, config, folder=tmp_path, on_step=lambda *seen: resumed.append(seen))
    chunks = list(again.run(tiny.picture(), 2, call))
    assert resumed[0] == (1, "chunk", done + 1) and not any(seen[0] == 0 for seen in resumed)
    for a, b in zip(whole, chunks):
        assert torch.equal(a.frames, b.frames) and a.scores == b.scores and torch.equal(a.latents, b.latents)
    other = ChunkRollout(pipe, KStepConfig(num_candidates=3, k=1, seed=9), folder=tmp_path)
    with pytest.raises(ConfigError, match="other settings"):
        list(other.run(tiny.picture(), 2, call))


@pytest.mark.parametrize(
    ("changes", "settings", "part"),
    [
        ({"num_frames": None}, {}, "num_frames missing"),
        ({"latents": torch.zeros(1)}, {}, "latents given"),
        ({}, {"k": 9}, "full schedule has 4"),
    ],
)
def test_unusable_calls_are_refused_before_work_is_spent(changes, settings, part):
    pipe, call = made("wan")
    call = {k: v for k, v in (call | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=part):
        rolled(pipe, call, **settings)


def test_a_text_pipeline_is_refused():
    with pytest.raises(ConfigError, match="got a WanPipeline; supported are WanImageToVideoPipeline"):
        ChunkRollout(tiny.wan())
