"""VideoMerge on tiny random pipelines: exact oracles of latent fusion, and the pipeline left as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from kvkeye.errors import ConfigError
from kvkeye.video import VideoCancelled, VideoMergeConfig, apply_videomerge, remove_videomerge
from kvkeye.video.adapters import TimeAxis
from kvkeye.video.fusion import fuse
from kvkeye.video.tiles import TilePlan, plan_tiles
from tests.video import tiny

SHORT, LONG = 9, 33  # pixel frames: 3 and 9 latent frames
LTX_TOKENS = 64  # of a latent frame; its latents are packed


@dataclass(frozen=True)
class Family:
    make: Callable[..., Any]
    call: Callable[..., dict[str, Any]]
    time: int = 2  # axis of the latents


FAMILIES = {
    "wan": Family(tiny.wan, tiny.wan_call),
    "wan-2.2": Family(lambda scheduler=None: tiny.wan(scheduler, two=True), tiny.wan_call),
    "wan-ti2v": Family(lambda scheduler=None: tiny.wan(scheduler, expand=True), tiny.wan_call),
    "wan-i2v": Family(tiny.wan_i2v, tiny.wan_i2v_call),
    "wan-i2v-clip": Family(
        lambda scheduler=None: tiny.wan_i2v(scheduler, clip=True), lambda n, **c: tiny.wan_i2v_call(n, True, **c)
    ),
    "hunyuan": Family(tiny.hunyuan, tiny.hunyuan_call),
    "cogvideox": Family(tiny.cogvideox, tiny.cogvideox_call, 1),
    "cogvideox-i2v": Family(tiny.cogvideox_i2v, lambda n, **c: tiny.cogvideox_call(n, image=tiny.picture(), **c), 1),
    "ltx": Family(tiny.ltx, tiny.ltx_call, 1),
}
SCHEDULERS = {"euler": tiny.flow_euler, "unipc": tiny.unipc}
CASES = [(name, None) for name in FAMILIES] + [(name, "unipc") for name in ("wan", "wan-i2v", "cogvideox")]


def sample(pipe: Any, family: Family, num_frames: int, **changes: Any) -> torch.Tensor:
    frames: torch.Tensor = pipe(**family.call(num_frames, **changes)).frames
    return frames


def made(name: str, scheduler: str | None) -> tuple[Any, Family]:
    family = FAMILIES[name]
    return family.make(SCHEDULERS[scheduler]() if scheduler else None), family


@pytest.mark.parametrize(("name", "scheduler"), CASES)
def test_one_tile_is_the_plain_pipeline_and_removal_leaves_no_trace(name, scheduler):
    """Oracle (a): tile >= clip changes no bit."""
    pipe, family = made(name, scheduler)
    plain, plain_long = sample(pipe, family, SHORT), sample(pipe, family, LONG)
    before = [set(vars(owner)) for owner in (pipe, pipe.transformer)]
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2))
    assert torch.equal(sample(pipe, family, SHORT), plain)
    tiled = sample(pipe, family, LONG)
    assert tiled.shape == plain_long.shape and not torch.equal(tiled, plain_long) and tiled.isfinite().all()
    assert torch.equal(sample(pipe, family, LONG), tiled), "same seed, same bytes"
    remove_videomerge(pipe)
    assert [set(vars(owner)) for owner in (pipe, pipe.transformer)] == before
    assert torch.equal(sample(pipe, family, LONG), plain_long)


@pytest.mark.parametrize(("name", "scheduler"), [case for case in CASES if "i2v" not in case[0]])
@pytest.mark.parametrize("tile_batch", [1, 2])
def test_tiles_without_overlap_are_independent_clips(name, scheduler, tile_batch):
    """Half of the latents in a clip of two disjoint tiles gives what a plain run of that half gives."""
    pipe, family = made(name, scheduler)
    shape = list(sample(pipe, family, SHORT).shape) if name != "ltx" else [1, 3 * LTX_TOKENS, 8]
    shape[family.time] *= 2
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    halves = [sample(pipe, family, SHORT, latents=half) for half in latents.chunk(2, family.time)]
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, tile_batch=tile_batch))
    both = sample(pipe, family, 21, latents=latents)
    expected = torch.cat(halves, family.time)
    if tile_batch == 1:
        assert torch.equal(both, expected)
    else:  # torch's products of two rows and of one differ in the last bits
        torch.testing.assert_close(both, expected, rtol=0, atol=2e-5)


class TimeLocal(WanTransformer3DModel):  # type: ignore[misc]
    """Treats every latent frame by itself."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_kwargs=None, return_dict=True):
        shift = timestep.view(-1, 1, 1, 1, 1) / 1000 + encoder_hidden_states.mean()
        return (torch.tanh(0.7 * hidden_states + shift),)


class LinearInTime(WanTransformer3DModel):  # type: ignore[misc]
    """Mixes the frames of what it sees by one fixed matrix."""

    matrix: torch.Tensor

    def forward(self, hidden_states, timestep, encoder_hidden_states, attention_kwargs=None, return_dict=True):
        return (torch.einsum("ij,bcjhw->bcihw", self.matrix.to(hidden_states), hidden_states),)


def wan_with(kind: type) -> Any:
    pipe = tiny.wan()
    pipe.transformer = kind.from_config(pipe.transformer.config)
    return pipe


@pytest.mark.parametrize("schedule", ["static", "shifted", "looped"])
@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("window", ["sine", "overlap-linear"])
def test_a_model_that_knows_no_time_makes_any_fusion_equal_to_the_plain_run(schedule, anchor, window):
    """Oracle (b)."""
    pipe = wan_with(TimeLocal)
    plain = pipe(**tiny.wan_call(LONG)).frames
    config = VideoMergeConfig(tile=4, overlap=2, schedule=schedule, anchor=anchor, window=window, noise="random")
    apply_videomerge(pipe, config)
    torch.testing.assert_close(pipe(**tiny.wan_call(LONG)).frames, plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("schedule", ["static", "looped"])
@pytest.mark.parametrize("window", ["sine", "flat", "hann"])
def test_a_linear_model_gives_the_closed_form(schedule, window):
    """Oracle (c): one Euler step of a model linear in time is a fixed matrix over the whole clip."""
    pipe = wan_with(LinearInTime)
    pipe.transformer.matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    apply_videomerge(pipe, VideoMergeConfig(tile=4, overlap=3, schedule=schedule, window=window))
    latents = torch.randn(1, 16, 9, 2, 2, generator=torch.Generator().manual_seed(2))
    call = tiny.wan_call(LONG, latents=latents, guidance_scale=1.0, num_inference_steps=1)
    got = pipe(**call).frames
    plan = plan_tiles(9, 4, 3, schedule, 0)
    whole = torch.zeros(9, 9, dtype=torch.float64)
    for frames, weights in zip(plan.frames(), plan.weights(window)):
        select = torch.eye(9, dtype=torch.float64)[frames]
        whole += select.T @ (weights[:, None] * pipe.transformer.matrix.double()) @ select
    sigma = float(pipe.scheduler.sigmas[0])
    truth = latents.double() - sigma * torch.einsum("ij,bcjhw->bcihw", whole, latents.double())
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=5e-6)


@pytest.mark.parametrize("looped", [False, True])
def test_order_of_tiles_changes_no_bit(looped):
    """Oracle (e)."""
    plan = plan_tiles(23, 6, 4, "looped" if looped else "static", 3)
    outputs = list(torch.randn(len(plan.starts), 2, 3, 6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
    weights = plan.weights("sine")
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = TilePlan(23, 6, 4, tuple(plan.starts[i] for i in order), plan.looped)
    first = fuse(outputs, plan, weights, TimeAxis(2))
    assert torch.equal(fuse([outputs[i] for i in order], shuffled, weights[order], TimeAxis(2)), first)


def test_defects_9_and_10_bf16_tiles_are_summed_and_kept_in_fp32():
    """The published loop adds and stores in bf16: a gain per frame off by up to 0.65 %."""
    plan = plan_tiles(64, 16, 12)
    value = torch.randn(1, 4, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    rounded = value.bfloat16()
    outputs = [rounded[:, :, start : start + 16] for start in plan.starts]
    fused = fuse(outputs, plan, plan.weights("sine"), TimeAxis(2))
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, rounded.float(), rtol=3e-7, atol=3e-7)
    pipe = tiny.wan()
    pipe.transformer.to(torch.bfloat16)
    states = []
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2))
    pipe(**tiny.wan_call(LONG, callback_on_step_end=lambda p, i, t, kw: states.append(kw["latents"].dtype) or kw))
    assert states == [torch.float32] * 3


@pytest.mark.parametrize("first", ["offload", "videomerge"])
def test_offloading_works_in_either_order_call_after_call(first):
    family = FAMILIES["wan"]
    pipe = apply_videomerge(tiny.wan(), VideoMergeConfig(tile=3, overlap=2))
    expected = sample(pipe, family, LONG)
    pipe = tiny.wan()
    plain = sample(pipe, family, LONG)
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2))
    if first == "videomerge":
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the pipeline takes its offloading hooks off and on after every call
        assert torch.equal(sample(pipe, family, LONG), expected)
    remove_videomerge(pipe)
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert torch.equal(sample(pipe, family, LONG), plain)


def test_every_tile_has_a_cache_of_its_own():
    """Disjoint tiles with a cache equal plain runs with a cache; a state shared by tiles would mix them."""
    from diffusers import FirstBlockCacheConfig

    pipe, family = tiny.wan(), FAMILIES["wan"]
    latents = torch.randn(1, 16, 6, 2, 2, generator=torch.Generator().manual_seed(6))
    steps = {"num_inference_steps": 6}
    uncached = sample(pipe, family, SHORT, latents=latents[:, :, :3], **steps)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    halves = [sample(pipe, family, SHORT, latents=half, **steps) for half in latents.chunk(2, 2)]
    assert not torch.equal(halves[0], uncached), "the cache is at work"
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0))
    assert torch.equal(sample(pipe, family, 21, latents=latents, **steps), torch.cat(halves, 2))
    remove_videomerge(pipe)
    assert torch.equal(sample(pipe, family, SHORT, latents=latents[:, :, :3], **steps), halves[0])


def test_guide_image_stays_with_later_tiles_only_when_asked():
    pipe, family = made("wan-i2v", None)
    seen: list[torch.Tensor] = []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for retain in (True, False):
        seen.clear()
        apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, retain_image=retain))
        sample(pipe, family, 21, num_inference_steps=1, guidance_scale=1.0)
        first, second = seen
        assert second.shape == first.shape == (1, 36, 3, 2, 2)
        assert torch.equal(second[:, 16:, 0], first[:, 16:, 0]) == retain
        assert (second[:, 16:20, 1:] == 0).all() and (first[:, 16:20, 0] == 1).all()


def test_prompts_per_tile_and_blending_between_them():
    """Defect A.7 #11. Disjoint tiles with a prompt each equal plain runs with that prompt."""
    pipe = tiny.wan(reads=True)
    prompts = ("a red disc moves left", "a blue square moves right")
    latents = torch.randn(1, 16, 6, 2, 2, generator=torch.Generator().manual_seed(6))
    call = tiny.wan_call(SHORT, negative_prompt="a", max_sequence_length=16)
    call = {name: value for name, value in call.items() if "embeds" not in name}
    halves = [pipe(**call | {"prompt": p, "latents": x}).frames for p, x in zip(prompts, latents.chunk(2, 2))]
    assert not torch.equal(*halves)
    long = call | {"prompt": prompts[0], "num_frames": 21, "latents": latents}
    for blend in ("nearest", "linear"):
        apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, prompts=prompts, prompt_blend=blend))
        assert torch.equal(pipe(**long).frames, torch.cat(halves, 2))
    shifted = {"tile": 3, "overlap": 0, "prompts": prompts, "schedule": "shifted"}
    results = []
    for blend in ("nearest", "linear"):
        apply_videomerge(pipe, VideoMergeConfig(prompt_blend=blend, **shifted))
        results.append(pipe(**long).frames)
    assert not torch.equal(*results)
    with pytest.raises(ConfigError, match="was called with 'a blue'"):
        pipe(**long | {"prompt": "a blue"})
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=1, prompts=prompts))
    with pytest.raises(ConfigError, match="got 2; this clip of 6 latent frames has 3 tiles of 3"):
        pipe(**long)


def test_progress_and_cancelling_between_tiles():
    """Defect A.7 #15: the published loop looks at `interrupt` only between steps."""
    pipe, family, seen = tiny.wan(), FAMILIES["wan"], []
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, on_tile=seen.append))
    sample(pipe, family, LONG)
    assert [(p.step, p.branch, p.first_tile) for p in seen] == [
        (step, branch, tile) for step in range(3) for branch in range(2) for tile in range(3)
    ]
    assert {(p.num_steps, p.num_tiles) for p in seen} == {(3, 3)}
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, on_tile=lambda p: p.step < 1 or p.first_tile < 2))
    with pytest.raises(VideoCancelled, match="before tile 2 of step 1"):
        sample(pipe, family, LONG)
    seen.clear()
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=0, on_tile=lambda p: setattr(pipe, "_interrupt", True)))
    with pytest.raises(VideoCancelled, match="interrupted before tile 1 of step 0"):
        sample(pipe, family, LONG)
    remove_videomerge(pipe)
    assert sample(pipe, family, SHORT).isfinite().all()


def test_defect_1_nothing_of_the_pipeline_is_copied():
    """The published code carries a copy of the pipeline that its own pinned packages cannot run."""
    pipe = tiny.hunyuan()
    call = type(pipe).__call__
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2))
    assert type(pipe).__call__ is call and type(pipe).__module__.startswith("diffusers.")


def test_unusable_pipelines_and_tiles_are_refused_before_work_is_spent():
    with pytest.raises(ConfigError, match="got a StableVideoDiffusionPipeline; supported are WanPipeline"):
        apply_videomerge(tiny.svd())
    with pytest.raises(ConfigError, match="positional table of this Wan model holds 64"):
        apply_videomerge(tiny.wan(), VideoMergeConfig(tile=65))
    with pytest.raises(ConfigError, match="overlap smaller than the tile"):
        apply_videomerge(tiny.cogvideox(), VideoMergeConfig(overlap=3))  # its own length is 3
    pipe = tiny.cogvideox()
    pipe.transformer = tiny.cogvideox_transformer(learned=True)
    with pytest.raises(ConfigError, match="CogVideoX model holds 3"):
        apply_videomerge(pipe, VideoMergeConfig(tile=4))
    assert "_kvkeye_videomerge" not in vars(pipe) and not hasattr(pipe.transformer, "_diffusers_hook")
