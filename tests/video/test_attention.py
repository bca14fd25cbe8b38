"""kvkeye's attention inside the Wan transformer: equal to diffusers', exact in tiles, and trainable."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from kvkeye.errors import ConfigError
from kvkeye.video import VideoMergeConfig, apply_videomerge, remove_videomerge
from kvkeye.video.attention import TilePlace, TileSelfAttention, use_kvkeye_attention
from kvkeye.video.tiles import plan_tiles
from tests.video import tiny


def inputs(num_frames: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, num_frames, 4, 4, generator=draw).to(dtype),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 8, 32, generator=draw).to(dtype),
    }


def test_whole_clip_equals_diffusers_and_cross_attention_is_untouched():
    model = tiny.wan_transformer()
    with torch.no_grad():
        expected = model(**inputs(5)).sample
        undo = use_kvkeye_attention(model)
        kinds = [(type(b.attn1.processor), type(b.attn2.processor)) for b in model.blocks]
        assert kinds == [(TileSelfAttention, WanAttnProcessor)] * 2
        torch.testing.assert_close(model(**inputs(5)).sample, expected, rtol=0, atol=5e-6)
        model.fuse_qkv_projections()
        torch.testing.assert_close(model(**inputs(5)).sample, expected, rtol=0, atol=5e-6)
        model.unfuse_qkv_projections()
        undo()
        assert torch.equal(model(**inputs(5)).sample, expected)


def test_tiles_inside_attention_equal_masked_attention_averaged_by_hand():
    """One layer in fp64: per tile, diffusers' own attention over the tile's tokens; outputs blended by weight."""
    model = tiny.wan_transformer().double()
    layer, plan = model.blocks[0].attn1, plan_tiles(7, 4, 2)
    x = torch.randn(1, 7 * 4, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotary = model.rope(torch.empty(1, 16, 7, 4, 4))
    truth = torch.zeros_like(x)
    for start, weights in zip(plan.starts, plan.weights("sine")):
        rows = slice(start * 4, (start + 4) * 4)
        own = tuple(part[:, rows] for part in rotary)
        output = WanAttnProcessor()(layer, x[:, rows], rotary_emb=own) - layer.to_out[0].bias
        truth[:, rows] += weights.repeat_interleave(4)[:, None] * output
    truth += layer.to_out[0].bias
    place = TilePlace()
    place.enter(plan, "sine", x.device)
    place.weights = plan.weights("sine")  # fp64 here; fp32 when sampling
    got = TileSelfAttention(place)(layer, x, rotary_emb=rotary)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-6)  # rotary tables are fp32


@pytest.mark.parametrize("schedule", ["static", "shifted", "looped"])
def test_attention_mode_runs_and_leaves_no_trace(schedule):
    pipe = tiny.wan(tiny.unipc())
    plain, long = pipe(**tiny.wan_call(9)).frames, pipe(**tiny.wan_call(33)).frames
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2, mode="attention", schedule=schedule, noise="random"))
    assert torch.equal(pipe(**tiny.wan_call(9)).frames, plain)
    tiled = pipe(**tiny.wan_call(33)).frames
    assert tiled.shape == long.shape and not torch.allclose(tiled, long, atol=1e-4)
    assert all(isinstance(b.attn1.processor, WanAttnProcessor) for b in pipe.transformer.blocks)
    remove_videomerge(pipe)
    assert torch.equal(pipe(**tiny.wan_call(33)).frames, long)


def test_a_clip_beyond_the_positional_table_is_refused():
    pipe = tiny.wan()
    pipe.transformer = tiny.wan_transformer(max_len=8)
    apply_videomerge(pipe, VideoMergeConfig(tile=3, overlap=2, mode="attention"))
    with pytest.raises(ConfigError, match=r"clip of 9 latent frames; .* holds 8"):
        pipe(**tiny.wan_call(33))


def test_attention_mode_is_refused_where_no_processor_exists():
    with pytest.raises(ConfigError, match="got a HunyuanVideoTransformer3DModel"):
        apply_videomerge(tiny.hunyuan(), VideoMergeConfig(tile=3, overlap=2, mode="attention"))


def test_training_through_tiles_follows_the_gradients_of_diffusers_and_lowers_the_loss():
    """The same steps with kvkeye's attention and with diffusers' give the same losses, falling."""
    histories = []
    for own in (True, False):
        model = tiny.wan_transformer().train()
        if own:
            use_kvkeye_attention(model)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        data = inputs(3)
        target = torch.tanh(data["hidden_states"])
        history = []
        for _ in range(15):
            loss = (model(**data).sample - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(float(loss.detach()))
        histories.append(history)
    assert histories[0][-1] < 0.7 * histories[0][0]
    assert max(abs(a - b) for a, b in zip(*histories)) < 1e-3


def test_a_low_rank_adapter_trains_through_blended_tiles():
    """Only the adapter on the query projections learns, through the backward pass of overlapping tiles."""
    model = tiny.wan_transformer().requires_grad_(False)
    place = TilePlace()
    place.enter(plan_tiles(6, 3, 2), "sine", torch.device("cpu"))
    use_kvkeye_attention(model, place)
    factors, draw = [], torch.Generator().manual_seed(1)
    for block in model.blocks:
        down = torch.nn.Parameter(torch.randn(24, 4, generator=draw) * 0.3)
        up = torch.nn.Parameter(torch.randn(4, 24, generator=draw))
        factors += [down, up]
        block.attn1.to_v.register_forward_hook(lambda m, args, out, a=down, b=up: out + args[0] @ a @ b)
    data = inputs(6)
    target = model(**data).sample.detach()  # of an adapter that is then forgotten
    with torch.no_grad():
        for up in factors[1::2]:
            up.zero_()
    optimizer = torch.optim.Adam(factors, 2e-2)
    losses = []
    for _ in range(20):
        loss = (model(**data).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
