"""Media in the engine: packed over requests, within a budget per step, once per content, at nobody else's cost."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kvkeye.errors import ConfigError
from tests.engine.logits import logits_of
from tests.engine.tiny import engine, greedy, picture, prompt, run


def watch(served):
    """Patches of every item of every encoder pass, as a list that grows."""
    passes, encode = [], served.runner.encode

    def spy(batch):
        passes.append([grid.num_patches for grid in batch.grids])
        encode(batch)

    served.runner.encode = spy
    return passes


def album(seed, count=8):
    """A request with `count` pictures of 24 to 120 patches."""
    return prompt(seed, 20, *(picture(100 * seed + i, (1, 4, 6 + 2 * (i % 4) * (i % 4))) for i in range(count)))


def clip(seed, frames=12):
    return prompt(seed, 9, picture(seed, *[(1, 4, 4)] * frames, kind="video"))


def test_media_of_several_requests_share_a_pass():
    served = engine()
    passes = watch(served)
    for i in range(5):
        served.add(str(i), prompt(i, 10, picture(i, (1, 4, 4 + 2 * i))), greedy(3))
    run(served)
    assert passes == [[16, 24, 32, 40, 48]]


def test_a_step_encodes_no_more_than_its_budget():
    served = engine(max_num_encoder_patches=100)
    passes = watch(served)
    for i in range(3):
        served.add(str(i), album(i), greedy(3))
    run(served)
    assert all(sum(each) <= 100 or len(each) == 1 for each in passes)
    assert sum(map(sum, passes)) == 3 * sum(span.num_patches for span in album_spans())
    # Neighbours that fit together were not encoded one by one.
    assert all(sum(each) + following[0] > 100 for each, following in itertools.pairwise(passes))


def album_spans():
    served = engine()
    served.add("a", album(0), greedy(1))
    return served.scheduler._by_id[0].request.media


def test_the_frames_of_a_1_5_clip_are_spread_over_steps_and_a_joint_clip_is_not():
    served = engine("1.5", max_num_encoder_patches=64)
    passes = watch(served)
    served.add("a", clip(3), greedy(3))
    run(served)
    assert passes == [[16] * 4] * 3
    served = engine(max_num_encoder_patches=64)
    passes = watch(served)
    served.add("a", prompt(3, 9, picture(3, (12, 4, 4), kind="video")), greedy(3))
    run(served)
    assert passes == [[192]]


@pytest.mark.parametrize("heavy", [album(1), clip(2, 24), prompt(3, 9, picture(3, (20, 4, 6), kind="video"))])
def test_a_decoding_request_gets_a_token_in_every_step(heavy):
    """Eight pictures, a long clip or a clip larger than the budget beside it: one token per step, none is left out."""
    served = engine(max_num_encoder_patches=96, max_num_batched_tokens=64, speculation=None)
    served.add("text", prompt(9, 12), greedy(60))
    served.step()
    passes = watch(served)
    served.add("heavy", heavy, greedy(4))
    num_tokens, num_heavy_steps, outputs = 1, 0, {}
    while "heavy" not in outputs:
        before = len(passes)
        news = {output.request_id: output for output in served.step()}
        if "text" in news:
            assert len(news["text"].outputs[0].token_ids) == num_tokens + 1
        num_tokens += 1
        num_heavy_steps += 1
        assert "text" in news or num_tokens > 60
        # Between two of its tokens lie at most one pass within the budget, or one item, and 64 tokens of prompts.
        assert len(passes) - before <= 1
        outputs.update({name: output for name, output in news.items() if output.finished})
    assert num_heavy_steps > 4
    alone = engine()
    alone.add("text", prompt(9, 12), greedy(60))
    assert (outputs | run(served))["text"].outputs[0].token_ids == run(alone)["text"].outputs[0].token_ids


def test_a_text_request_that_arrives_later_does_not_wait_for_pictures():
    served = engine(max_num_encoder_patches=40)
    served.add("heavy", album(1), greedy(4))
    served.add("text", prompt(9, 12), greedy(4))
    order = []
    while served.has_work:
        order += [output.request_id for output in served.step() if output.finished]
    assert order == ["text", "heavy"]


def test_prefill_begins_before_the_last_picture_is_encoded():
    served = engine(max_num_encoder_patches=24, enable_prefix_cache=False)
    served.add("a", album(1), greedy(4))
    served.step()
    seq = served.scheduler.sequence(0)
    spans = seq.request.media
    assert spans[0].end < seq.num_computed == spans[1].start
    assert seq.embeds == set(), "what has been read is given up"


def test_two_requests_that_arrive_together_encode_a_picture_once():
    served = engine(enable_prefix_cache=False)
    passes = watch(served)
    for name in "abc":
        served.add(name, prompt(7, 12, picture(1, (1, 4, 6)), picture(2, (1, 2, 2))), greedy(4))
    outputs = run(served)
    assert passes == [[24, 4]]
    stats = served.stats()
    assert (stats.encoder_hits, stats.encoder_misses, stats.num_encoded_patches) == (4, 2, 28)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs.values()}) == 1


def test_a_picture_outlives_the_abort_of_who_brought_it():
    served = engine(max_num_encoder_patches=24, enable_prefix_cache=False)
    passes = watch(served)
    pictures = [picture(i, (1, 4, 6)) for i in range(3)]
    served.add("first", prompt(1, 12, *pictures), greedy(4))
    served.add("second", prompt(2, 12, pictures[0], pictures[2]), greedy(4))
    served.step()
    served.abort("first")
    output = run(served)["second"]
    assert passes == [[24], [24]]
    alone = engine()
    alone.add("second", prompt(2, 12, picture(0, (1, 4, 6)), picture(2, (1, 4, 6))), greedy(4))
    assert output.outputs[0].token_ids == run(alone)["second"].outputs[0].token_ids


def test_embeddings_are_freed_when_nobody_needs_them_and_kept_within_the_limit():
    hidden = 128 * 4
    served = engine(encoder_cache_memory=10 * hidden, enable_prefix_cache=False)
    for i in range(4):
        served.add(str(i), prompt(i, 12, picture(i, (1, 4, 4))), greedy(2))  # 4 tokens each
    run(served)
    assert served.stats().encoder_bytes == 8 * hidden
    assert {embeds.untyped_storage().nbytes() for embeds in served.runner.media_embeds.values()} == {4 * hidden}
    served.add("last", prompt(9, 12, picture(3, (1, 4, 4))), greedy(2))
    run(served)
    assert served.stats().encoder_hits == 1


def test_aborted_before_its_prefill_nothing_stays_behind():
    served = engine(max_num_encoder_patches=24, encoder_cache_memory=0)
    served.add("a", album(1), greedy(4))
    served.step()
    assert served.stats().num_encoder_steps == 1
    served.abort("a")
    served.scheduler.check()
    assert served.stats().encoder_bytes == 0 and not served.has_work


def test_a_failing_encoder_ends_the_requests_of_the_pass_only():
    served = engine(max_num_encoder_patches=24)
    served.add("text", prompt(9, 12), greedy(12))
    broken = prompt(1, 9, picture(1, (1, 4, 4)))
    broken.media[0].pixel_values = torch.zeros(3, 5)
    served.add("broken", broken, greedy(5))
    served.add("same", prompt(2, 9, picture(1, (1, 4, 4))), greedy(5))  # shares the broken picture
    served.add("later", prompt(4, 9, picture(4, (1, 4, 6))), greedy(5))  # is not in the same pass
    outputs = run(served)
    reasons = {name: output.outputs[0].finish_reason for name, output in outputs.items()}
    assert reasons == {"text": "length", "broken": "error", "same": "error", "later": "length"}
    assert "pixel_values" in outputs["same"].error
    served.scheduler.check()
    again = prompt(2, 9, picture(1, (1, 4, 4)))
    served.add("again", again, greedy(5))
    assert run(served)["again"].outputs[0].finish_reason == "length"


def test_a_picture_of_nan_does_not_reach_its_neighbours_in_the_pass():
    def embeds(*others):
        served = engine(backends="cpp")
        good = prompt(5, 12, picture(5, (1, 6, 10)))
        for name, ready in enumerate((*others[:1], good, *others[1:])):
            served.add(str(name), ready, greedy(5))
        name = served.scheduler.requests[str(len(others[:1]))].media[0].embeds
        outputs = run(served)
        assert sum(output.outputs[0].finish_reason == "error" for output in outputs.values()) == len(others)
        return served.runner.media_embeds[name]

    bad = [prompt(seed, 9, picture(seed, (1, 2, 6))) for seed in (1, 2)]
    for ready in bad:
        ready.media[0].pixel_values.fill_(math.nan)
    alone = embeds()
    assert torch.isfinite(alone).all() and torch.equal(embeds(*bad), alone)


@pytest.mark.parametrize("budget", [1, 64, 200])
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_answers_have_the_bits_of_any_other_budget(version, budget):
    prompts = {
        "album": lambda: album(1),
        "clip": lambda: clip(2),
        "picture": lambda: prompt(3, 9, picture(3, (1, 6, 6))),
    }
    plain = logits_of(engine(version, backends="cpp"), prompts)
    squeezed = engine(
        version, backends="cpp", max_num_encoder_patches=budget, encoder_cache_memory=0, max_num_batched_tokens=50
    )
    for name, logits in logits_of(squeezed, prompts).items():
        assert torch.equal(logits, plain[name]), name


def test_stages_come_in_order_and_only_where_there_is_something_to_do():
    served = engine(max_num_encoder_patches=24)
    stages = {}
    for name, ready in (("album", album(1)), ("text", prompt(9, 12)), ("again", album(1))):
        served.add(name, ready, greedy(3), on_stage=stages.setdefault(name, []).append)
    run(served)
    assert stages["album"] == ["start", "vision", "prefill"]
    assert stages["text"] == stages["again"] == ["start", "prefill"]


def test_vision_is_over_when_prefill_begins():
    served = engine()
    encoded = []
    served.add(
        "a", album(1), greedy(3), on_stage=lambda stage: encoded.append((stage, len(served.runner.media_embeds)))
    )
    run(served)
    assert encoded == [("start", 0), ("vision", 0), ("prefill", 8)]


def test_a_failing_listener_is_logged_and_disturbs_nobody(caplog):
    served = engine()

    def listen(stage):
        raise KeyError(stage)

    served.add("a", album(1), greedy(3), on_stage=listen)
    assert run(served)["a"].outputs[0].finish_reason == "length"
    assert "on_stage failed" in caplog.text


def test_time_of_a_shared_pass_is_split_by_patches():
    served = engine()
    served.add("small", prompt(1, 9, picture(1, (1, 2, 2))), greedy(2))
    served.add("large", prompt(2, 9, picture(2, (1, 8, 12))), greedy(2))
    served.add("free", prompt(3, 9, picture(2, (1, 8, 12))), greedy(2))
    outputs = run(served)
    times = {name: output.metrics.vision_ms for name, output in outputs.items()}
    assert times["large"] == pytest.approx(24 * times["small"]) and times["free"] == 0 < times["small"]
    for output in outputs.values():
        assert output.metrics.vision_ms <= output.metrics.prefill_ms


@pytest.mark.parametrize("name", ["max_num_encoder_patches", "num_prepare_threads"])
def test_limits_are_checked(name):
    with pytest.raises(ConfigError, match=f"{name}: got 0"):
        engine(**{name: 0})
