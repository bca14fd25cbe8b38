"""The engine end to end on a tiny random model: answers, ends, failures, and what they leave behind."""

from __future__ import annotations

import gc
import itertools
import math
import weakref

import pytest
import torch

from kvkeye.engine import SamplingParams
from kvkeye.errors import CapacityError, ConfigError, RequestError
from tests.engine.tiny import EOS, IMAGE, Processor, engine, greedy, model, picture, prompt, run


def assert_clean(served):
    served.scheduler.check()
    stats = served.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert not served._trackers


def answer(served, name="a", **fields):
    served.add(name, fields.pop("prompt", prompt(1, 20)), **fields)
    return run(served)[name]


def tokens_alone(ready, num_tokens):
    return answer(engine(), prompt=ready, sampling=greedy(num_tokens)).outputs[0].token_ids


def dense_greedy(ready, num_tokens):
    """The same answer without cache, blocks or batches: the whole sequence again for every token."""
    from kvkeye.layers import PackedContext
    from kvkeye.models.keye.positions import MediaGrid

    net, ids, positions = model(), list(ready.token_ids), ready.positions
    grids = [MediaGrid(m.kind, grid) for m in ready.media for grid in m.grids]
    pixels = torch.cat([m.pixel_values for m in ready.media])
    for _ in range(num_tokens):
        with torch.inference_mode():
            tokens = torch.tensor(ids)
            embeds = net.embed(tokens, net.encode_media(pixels, grids), (tokens == IMAGE).nonzero()[:, 0])
            hidden = net(embeds, positions, PackedContext.from_lengths([len(ids)]))
            logits = net.logits(hidden[-1:])
        positions = torch.cat([positions, torch.full((3, 1), len(ids) + ready.position_delta)], dim=1)
        ids.append(int(logits[0].argmax()))
    return ids[len(ready.token_ids) :]


def test_the_answer_is_that_of_the_model_without_an_engine():
    ready = prompt(4, 33, picture(1, (1, 6, 10)), picture(2, (1, 2, 4)))
    output = answer(engine(max_prefill_chunk=9), prompt=ready, sampling=greedy(40))
    assert output.outputs[0].token_ids == dense_greedy(ready, 40)


def test_metrics_add_up():
    served = engine()
    output = answer(served, prompt=prompt(1, 40, picture(1, (1, 4, 4))), sampling=greedy(10))
    metrics = output.metrics
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens, metrics.num_cached_tokens) == (46, 10, 0)
    assert metrics.ttft_ms == pytest.approx(metrics.queue_ms + metrics.prefill_ms)
    assert 0 < metrics.vision_ms <= metrics.prefill_ms
    assert metrics.tokens_per_s == pytest.approx(9e3 / metrics.decode_ms)
    again = answer(served, prompt=prompt(1, 40, picture(1, (1, 4, 4))), sampling=greedy(10))
    assert again.metrics.num_cached_tokens == 32
    assert again.outputs[0].token_ids == output.outputs[0].token_ids


def test_equal_pictures_are_encoded_once_and_equal_pads_are_not_equal_pictures():
    served = engine()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        served.add(name, prompt(7, 12, picture(seed, (1, 4, 6))), greedy(4))
    outputs = run(served)
    stats = served.stats()
    assert (stats.encoder_hits, stats.encoder_misses) == (1, 2)
    tokens = {name: output.outputs[0].token_ids for name, output in outputs.items()}
    assert tokens["a"] == tokens["b"]
    assert_clean(served)


def test_seeds_repeat_and_differ():
    def sampled(seed, engine_seed=0, first="a"):
        served = engine(seed=engine_seed)
        values = SamplingParams(max_tokens=12, seed=seed, ignore_eos=True)
        return answer(served, first, sampling=values).outputs[0].token_ids

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(None) == sampled(None) == sampled(None, first="b")
    assert sampled(None) != sampled(None, engine_seed=9)


def test_four_answers_share_the_prompt_and_repeat_alone():
    values = {"temperature": 1.2, "max_tokens": 20, "seed": 11, "ignore_eos": True}
    served = engine()
    output = answer(served, prompt=prompt(2, 45), sampling=SamplingParams(n=4, **values))
    answers = [each.token_ids for each in output.outputs]
    assert [each.index for each in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in answers}) == 4
    assert_clean(served)
    single = answer(engine(), prompt=prompt(2, 45), sampling=SamplingParams(**values))
    assert single.outputs[0].token_ids == answers[0]
    # Under pressure each branch is preempted on its own and still repeats.
    small = engine(num_blocks=16, block_size=8, max_model_len=128)
    for name in ("x", "y"):
        small.add(name, prompt(2, 45), SamplingParams(n=4, **values))
    outputs = run(small)
    for name in ("x", "y"):
        assert [each.token_ids for each in outputs[name].outputs] == answers
    assert small.stats().num_preemptions > 0
    assert_clean(small)


@pytest.mark.parametrize("moment", ["waiting", "in the prompt", "decoding", "forked"])
def test_abort_frees_everything(moment):
    served = engine(max_prefill_chunk=8, speculation=None)  # a token a step
    sampling = SamplingParams(n=3, max_tokens=30, seed=1) if moment == "forked" else greedy(30)
    served.add("a", prompt(1, 40, picture(1, (1, 4, 4))), sampling)
    served.add("other", prompt(2, 10), greedy(12))
    for _ in range({"waiting": 0, "in the prompt": 2}.get(moment, 12)):
        served.step()
    output = served.abort("a")
    assert output.finished and {each.finish_reason for each in output.outputs} == {"abort"}
    assert served.abort("a") is None
    assert run(served)["other"].outputs[0].token_ids == tokens_alone(prompt(2, 10), 12)
    assert_clean(served)


def test_a_stop_string_cuts_the_text_and_ends_the_row():
    full = answer(engine(), sampling=greedy(40)).outputs[0]
    stop = full.text[10:13]
    where = full.text.index(stop)
    cut = answer(engine(), sampling=greedy(40, stop=["never in here", stop])).outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (full.text[:where], "stop", stop)
    assert cut.token_ids == full.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 40


def test_a_stop_string_in_the_last_token_allowed_still_counts():
    text = answer(engine(), sampling=greedy(12)).outputs[0].text
    cut = answer(engine(), sampling=greedy(12, stop=text[-2:])).outputs[0]
    assert (cut.text + cut.stop_reason, cut.finish_reason) == (text[: text.index(text[-2:]) + 2], "stop")


def test_stop_tokens_end_the_row_unseen():
    full = answer(engine(), sampling=greedy(20)).outputs[0]
    token = full.token_ids[7]
    first = full.token_ids.index(token)
    cut = answer(engine(), sampling=greedy(20, stop_token_ids=[token])).outputs[0]
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (full.token_ids[: first + 1], "stop", token)
    assert cut.text == Processor().decode(full.token_ids[:first])


def test_streamed_snapshots_only_grow():
    served = engine()
    served.add("a", prompt(1, 20), greedy(40))
    seen = [""]
    while served.has_work:
        seen += [output.outputs[0].text for output in served.step()]
    assert all(now.startswith(before) for before, now in itertools.pairwise(seen))
    assert seen[-1] == answer(engine(), sampling=greedy(40)).outputs[0].text


def test_pixels_go_with_their_request():
    served, ready = engine(), prompt(1, 9, picture(1, (1, 2, 2)))
    pixels = weakref.ref(ready.media[0].pixel_values)
    gc.disable()
    try:
        served.add("a", ready, greedy(3))
        del ready
        assert pixels() is not None
        output = run(served)["a"]
        assert output.finished and pixels() is None
    finally:
        gc.enable()


def test_logprobs_are_those_of_the_logits():
    served = engine()
    rows = []
    served.runner.logits_hook = lambda names, logits: rows.append(logits[0].double().log_softmax(-1))
    values = SamplingParams(temperature=1.5, max_tokens=6, seed=3, logprobs=3, repetition_penalty=1.3, ignore_eos=True)
    output = answer(served, sampling=values).outputs[0]
    assert len(output.logprobs) == len(output.token_ids) == 6
    for row, token, entry in zip(rows, output.token_ids, output.logprobs):
        top = row.topk(3).indices.tolist()
        assert set(entry) == {token, *top}
        assert entry[token].rank == int((row > row[token]).sum()) + 1
        for i, item in entry.items():
            assert item.logprob == pytest.approx(float(row[i]), abs=1e-5)
            assert item.decoded_token == Processor().decode([i])
        assert [entry[i].rank for i in top] == [1, 2, 3]


def test_zero_logprobs_report_the_token_alone():
    output = answer(engine(), sampling=greedy(3, logprobs=0)).outputs[0]
    assert [set(entry) for entry in output.logprobs] == [{token} for token in output.token_ids]


def test_penalties_see_prompt_and_answer():
    plain = answer(engine(), sampling=greedy(30)).outputs[0].token_ids
    assert len(set(plain)) < 30, "the random model repeats itself; else this test says nothing"
    fresh = answer(engine(), sampling=greedy(30, presence_penalty=2.0, frequency_penalty=2.0)).outputs[0].token_ids
    assert len(set(fresh)) > len(set(plain))


def test_nan_logits_end_their_request_only():
    served = engine()
    served.add("bad", prompt(1, 9, picture(1, (1, 2, 2))), greedy(5))
    served.add("good", prompt(2, 20), greedy(20))
    served.scheduler._by_id[0].request.payload.media[0].pixel_values[0, 0] = math.nan
    outputs = run(served)
    assert outputs["bad"].outputs[0].finish_reason == "error" and "probabilities" in outputs["bad"].error
    assert outputs["good"].outputs[0].token_ids == tokens_alone(prompt(2, 20), 20)
    assert_clean(served)


def test_a_failing_forward_pass_ends_its_requests_and_the_engine_goes_on():
    served = engine()
    broken = prompt(1, 9, picture(1, (1, 2, 2)))
    broken.media[0].pixel_values = torch.zeros(3, 5)
    served.add("broken", broken, greedy(5))
    output = run(served)["broken"]
    assert output.finished and output.outputs[0].finish_reason == "error" and "pixel_values" in output.error
    assert_clean(served)
    fine = answer(served, prompt=prompt(2, 20), sampling=greedy(20))
    assert fine.outputs[0].finish_reason == "length"


BAD_REQUESTS = [
    ({"prompt": prompt(1, 600)}, RequestError, r"600 prompt tokens .* the context holds 512"),
    ({"prompt": prompt(1, 500), "sampling": greedy(100)}, RequestError, "500 prompt tokens . 100 new tokens = 600"),
    ({"prompt": []}, RequestError, "empty"),
    ({"prompt": ""}, RequestError, "empty"),
    ({"prompt": [1, 2, 999]}, RequestError, r"999.*\[0, 320\)"),
    ({"prompt": [1, -1]}, RequestError, "-1"),
    ({"prompt": [True]}, RequestError, "True"),
    ({"prompt": 5}, RequestError, "int"),
    ({"prompt": None}, RequestError, "NoneType"),
    ({"sampling": SamplingParams(stop_token_ids=[320])}, RequestError, "320"),
    ({"sampling": {"temperature": 1}}, RequestError, "dict"),
    ({"salt": "x" * 1025}, RequestError, "1025 bytes"),
    ({"sampling": SamplingParams(n=8), "served": {"max_num_seqs": 4}}, RequestError, "max_num_seqs is 4"),
]


@pytest.mark.parametrize("fields, error, words", BAD_REQUESTS)
def test_a_bad_request_is_refused_and_leaves_nothing(fields, error, words):
    fields = dict(fields)
    served = engine(**fields.pop("served", {}))
    with pytest.raises(error, match=words):
        served.add("a", fields.pop("prompt", prompt(1, 5)), **fields)
    assert_clean(served)
    assert answer(served, sampling=greedy(3)).finished


def test_a_full_queue_refuses():
    served = engine(max_waiting=2)
    for name in "ab":
        served.add(name, prompt(1, 5), greedy(3))
    with pytest.raises(CapacityError, match="2 requests are waiting; max_waiting is 2"):
        served.add("c", prompt(1, 5), greedy(3))
    assert set(run(served)) == {"a", "b"}


def test_defaults_come_from_the_checkpoint_and_the_context():
    served = engine(max_model_len=64)
    output = answer(served, prompt=prompt(3, 30))
    assert output.outputs[0].finish_reason in ("stop", "length")
    assert output.metrics.num_generated_tokens <= 34
    assert served.default_sampling().temperature == 0.0


def test_end_of_sentence_is_not_shown():
    served = engine()
    full = answer(served, sampling=greedy(20)).outputs[0].token_ids
    served.processor.eos_token_ids = (EOS, full[4])
    cut = answer(served, sampling=SamplingParams(temperature=0, max_tokens=20)).outputs[0]
    assert cut.finish_reason == "stop" and cut.token_ids == full[: full.index(full[4]) + 1]
    assert cut.text == served.processor.decode(cut.token_ids[:-1])


def test_salt_separates_the_cache():
    served = engine()
    starts = []
    for name, salt in (("a", ""), ("b", "tenant"), ("c", "tenant"), ("d", "")):
        starts.append(
            answer(served, name, prompt=prompt(1, 70), sampling=greedy(2), salt=salt).metrics.num_cached_tokens
        )
    assert starts == [0, 0, 64, 64]


CONFIGS = [
    ({"num_blocks": 8}, CapacityError, "holds 8 blocks .* one context of 512 tokens needs 16"),
    ({"kv_cache_memory": 1000}, CapacityError, "holds 0 blocks"),
    ({"num_blocks": 1 << 40}, CapacityError, r"KV cache .* GiB .* are free"),
    ({"max_model_len": 8193}, ConfigError, "positions end at 8192"),
    ({"block_size": 24}, ConfigError, "power of two"),
    ({"block_size": 0}, ConfigError, "at least 1"),
    ({"max_num_seqs": True}, ConfigError, "max_num_seqs"),
    ({"max_prefill_chunk": 0}, ConfigError, "max_prefill_chunk"),
    ({"dtype": "int8"}, ConfigError, "float32, bfloat16, float16"),
    ({"model": ""}, ConfigError, "folder"),
    ({"seed": None}, ConfigError, "seed"),
    ({"backends": "fast"}, ConfigError, "fast"),
]


@pytest.mark.parametrize("config, error, words", CONFIGS)
def test_a_bad_configuration_is_refused_before_anything_is_allocated(config, error, words):
    with pytest.raises(error, match=words):
        engine(**config)
