"""Speculation changes nothing but the time: tokens and logits are those of plain decoding, bit for bit.

A scripted drafter is right as often as asked, so that steps accept and reject; the n-gram drafter is the one that users
get. `test_speculation_sweep.py` holds the long comparison.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kvkeye.engine import LLM, SamplingParams, SpeculationConfig
from kvkeye.engine.draft import Draft, branch_length, branch_masks
from kvkeye.engine.draft_model import DraftModel
from kvkeye.errors import ConfigError
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.draft.weights import save_head, target_hash
from kvkeye.testing.tiny import tiny_keye_config, tiny_keye_model, write_tiny_checkpoint
from tests.engine.heads import drafted, random_head
from tests.engine.logits import check_lossless, plain_answers, preempt_often, script_of
from tests.engine.scripted import ScriptedDrafter
from tests.engine.test_bits import MANY, PROMPTS
from tests.engine.tiny import EOS, engine, greedy, model, picture, prompt, run

EVERYTHING = {"num_speculative_tokens": 63, "adaptive": False}


def served_by(version="preview", dtype=torch.float32, drafter=None, speculation=None, **config):
    values = {"backends": "cpp", "max_model_len": 640, "speculation": speculation} | config
    return engine(version, dtype, drafter, **values)


@functools.cache
def truth(version="preview", dtype=torch.float32):
    return plain_answers(served_by(version, dtype), MANY)


def scripted(version="preview", dtype=torch.float32, width=2, depth=5, accuracy=0.7, **config):
    served = served_by(version, dtype, None, EVERYTHING, **config)
    served.speculation.drafter = script_of(
        truth(version, dtype), served.vocab_size, accuracy=accuracy, width=width, depth=depth
    )
    return served


# Greedy


@pytest.mark.parametrize("width, depth", [(1, 1), (1, 8), (2, 3), (3, 5), (4, 8)])
def test_trees_of_every_shape(width, depth):
    counts = check_lossless(scripted(width=width, depth=depth), PROMPTS, truth())
    assert 0.2 < counts.acceptance_by_position[0] < 0.8


WAYS = {
    "a batch of 16": ({}, MANY, {}),
    "chunks of 7": ({"max_prefill_chunk": 7}, PROMPTS, {}),
    "a budget of 13": ({"max_num_batched_tokens": 13}, PROMPTS, {}),
    "blocks of 1": ({"block_size": 1}, PROMPTS, {}),
    "blocks of 128": ({"block_size": 128}, PROMPTS, {}),
    "cached prefixes": ({}, PROMPTS, {"rounds": 2}),
    "few blocks": ({"num_blocks": 20}, PROMPTS, {}),
    "preemption": ({"max_prefill_chunk": 19}, PROMPTS, {"interrupt": preempt_often}),
}


@pytest.mark.parametrize("way", WAYS)
def test_in_every_way_of_serving(way):
    config, prompts, how = WAYS[way]
    served = scripted(width=3, depth=4, **config)
    counts = check_lossless(served, prompts, truth(), **how)
    assert counts.num_accepted_tokens > 50 and counts.num_drafts > counts.num_accepted_tokens / 4
    stats = served.stats()
    assert way != "cached prefixes" or stats.num_cached_tokens >= 32 + 128
    assert way not in ("few blocks", "preemption") or stats.num_preemptions > 1


@pytest.mark.parametrize("name", ["short", "long", "two pictures", "clip"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_prompts_own_pass_checks_proposals(name, chunk):
    """All four are right: the step that ends the prompt gives five tokens."""
    served = scripted(width=1, depth=4, accuracy=1.0, max_prefill_chunk=chunk)
    served.add(name, PROMPTS[name](), greedy(16))
    outputs = []
    while not outputs:
        outputs = served.step()
    assert outputs[0].outputs[0].token_ids == truth()[name][0][:5]
    counts = served.stats().speculation
    assert (counts.num_decode_steps, counts.num_drafts, counts.num_accepted_tokens) == (1, 1, 4)
    assert counts.tokens_per_step == 5 and counts.saved_ms == 0
    metrics = run(served)[name].metrics
    assert metrics.tokens_per_s == pytest.approx((16 - 5) * 1e3 / metrics.decode_ms)


@pytest.mark.parametrize("version, dtype", [("1.5", torch.float32), ("preview", torch.bfloat16)])
def test_other_version_and_dtype(version, dtype):
    check_lossless(scripted(version, dtype, max_prefill_chunk=7, num_blocks=24), PROMPTS, truth(version, dtype))


def test_a_long_chunk_beside_trees():
    """A tree's mask has 64 bits a row: beside more new tokens of another request branches are cut off, not moved."""
    served = scripted(width=4, depth=6)
    prompts = {"short": MANY["short"], "two splits": MANY["two splits"], "long": MANY["long"]}
    served.add("block", MANY["block"](), greedy(64))
    for _ in range(3):
        served.step()
    check_lossless(served, prompts, truth())


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("width, adaptive", [(1, True), (1, False), (4, False)])
def test_the_drafters_that_users_get(method, width, adaptive):
    config = SpeculationConfig(method, num_speculative_tokens=12, tree_width=width, adaptive=adaptive)
    served = served_by(speculation=config)
    counts = check_lossless(served, PROMPTS, truth(), rounds=2)
    assert counts.num_accepted_tokens > (5 if adaptive else 30)  # random weights repeat themselves


def test_recent_answers_are_proposed_again():
    own, shared = (
        check_lossless(served_by(speculation={"method": method, "adaptive": False}), PROMPTS, truth(), rounds=2)
        for method in ("ngram", "suffix")
    )
    assert shared.tokens_per_step > 1.5 * own.tokens_per_step


def test_salts_share_no_answers():
    def second(salt):
        served = served_by(speculation={"method": "suffix", "adaptive": False}, enable_prefix_cache=False)
        for name, own in (("first", "a"), ("second", salt)):
            served.add(name, prompt(3, 40), greedy(40), salt=own)
            output = run(served)[name]
        return output.metrics.speculation.num_accepted_tokens

    assert second("a") > second("b")


# A small model


def drafted_by(other, **config):
    """Served with a draft model of few blocks: the target's weights, or some that know nothing of them."""
    drafter = DraftModel(tiny_keye_model(seed=9) if other else model(), 60, 16, "cpp")
    return served_by(drafter=drafter, speculation=EVERYTHING | {"num_speculative_tokens": 5}, **config)


@pytest.mark.parametrize("other", [False, True])
def test_a_draft_model(other):
    served = drafted_by(other)
    counts = check_lossless(served, PROMPTS, truth(), rounds=2)
    assert (counts.num_accepted_tokens > 20) != other
    served.add("text", PROMPTS["long"](), greedy(31))
    (first,) = served.step()  # computes the prompt too
    assert len(first.outputs[0].token_ids) == (1 if other else 6)
    metrics = run(served)["text"].metrics.speculation
    assert (metrics.acceptance_by_position == [1.0] * 5) != other  # text alone: it says what the target says
    assert served.speculation.drafter.pool.num_used == 0


def test_a_drafter_that_is_given_asks_for_speculation():
    """Kernels and recordings are chosen by the configuration."""
    served = served_by(drafter=DraftModel(model(), 60, 16, "cpp"), speculation="auto")
    assert served.config.speculation == SpeculationConfig()


def test_a_draft_model_follows_preemption_and_chunks():
    served = drafted_by(False, max_prefill_chunk=19)
    check_lossless(served, PROMPTS, truth(), interrupt=preempt_often)
    assert served.speculation.drafter.pool.num_used == 0


def test_a_draft_model_from_its_folder(tmp_path):
    folder, other = (write_tiny_checkpoint(tmp_path / name) for name in ("target", "draft"))
    config = {"model": str(folder), "max_model_len": 256, "num_blocks": 16}
    wanted = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 3, "adaptive": False}

    def answer(**given):
        with LLM(**config, **given) as llm:
            return llm.generate("some text", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0]

    plain, found = answer(speculation=None), answer(speculation=wanted)
    assert found.outputs == plain.outputs
    assert found.metrics.speculation.num_accepted_tokens > 10
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the tokenizer of .*draft is not that of"):
        answer(speculation=wanted)


# A head


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 3])
def test_a_head(way, width):
    """Of random weights: it sees and keeps everything, and is nearly always wrong."""
    config, prompts, how = WAYS[way]
    served = drafted(random_head(), width=width, speculation={"num_speculative_tokens": 6}, **config)
    counts = check_lossless(served, prompts, truth(), **how)
    assert counts.num_draft_tokens > 5 * counts.num_drafts
    assert not served.speculation.drafter._rows


@pytest.mark.parametrize("version, dtype", [("1.5", torch.float32), ("preview", torch.bfloat16)])
def test_a_head_of_other_version_and_dtype(version, dtype):
    served = drafted(random_head(version, dtype), version, dtype, width=2, max_prefill_chunk=7, num_blocks=24)
    check_lossless(served, PROMPTS, truth(version, dtype))


def test_a_head_from_its_folder(tmp_path):
    folder, other = (write_tiny_checkpoint(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    config = HeadConfig.for_target(tiny_keye_config().text, target_hash(folder), (0, 1, 2))
    head = DraftHead(config)
    save_head(head, tmp_path / "head", dict(head.named_parameters()), torch.float32)
    wanted = {"method": "eagle3", "model": str(tmp_path / "head"), "num_speculative_tokens": 3, "adaptive": False}

    def answer(model, **given):
        with LLM(str(model), max_model_len=256, num_blocks=16, **given) as llm:
            return llm.generate("some text", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))[0]

    assert answer(folder, speculation=wanted).outputs == answer(folder, speculation=None).outputs
    with pytest.raises(ConfigError, match=r"the head .*head was trained for another checkpoint than"):
        answer(other, speculation=wanted)


# Sampling

SAMPLING = {
    "warm": {"temperature": 0.8, "top_p": 0.95},
    "hot": {"temperature": 1.5, "top_k": 40, "min_p": 0.01},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "greedy with penalties": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "log-probabilities": {"temperature": 0.9, "logprobs": 3},
    "three answers": {"temperature": 1.0, "n": 3},
}


@pytest.mark.parametrize("case", SAMPLING)
def test_a_seed_gives_the_answer_of_plain_decoding(case):
    """Not only its distribution: the same tokens, reasons and log-probabilities."""
    params = SamplingParams(max_tokens=40, seed=11, **SAMPLING[case])

    def answers(served):
        for i, name in enumerate(("long", "picture", "clip")):
            served.add(name, PROMPTS[name](), params, salt=str(i))
        return {name: output.outputs for name, output in run(served).items()}

    plain = answers(served_by())
    served = served_by(speculation=EVERYTHING)

    def coming(seq):
        return plain[seq.request.request_id][seq.index].token_ids[seq.num_generated :]

    served.speculation.drafter = ScriptedDrafter(coming, served.vocab_size, 0.7, 2, 5)
    assert answers(served) == plain
    assert served.stats().speculation.num_accepted_tokens > 40


# Ends

ENDS = {
    "end of sentence": lambda tokens, text: {"stop_token_ids": [tokens[20]]},
    "stop string": lambda tokens, text: {"stop": text[17:20]},
    "length": lambda tokens, text: {"max_tokens": 23},
    "stop string at the end": lambda tokens, text: {"stop": text[-2:]},
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.parametrize("seed", [4, 5])
def test_an_answer_ends_where_plain_decoding_ends(case, seed):
    """Also when that lies inside what a step accepted: nothing behind it is shown or counted."""

    def answer(served, **given):
        served.add("a", prompt(seed, 30), SamplingParams(temperature=1.2, seed=seed, **({"max_tokens": 60} | given)))
        return run(served)["a"]

    whole = answer(served_by()).outputs[0]
    assert EOS not in whole.token_ids
    given = ENDS[case](whole.token_ids, whole.text)
    plain = answer(served_by(), **given)
    for depth in (2, 5, 8):
        served = served_by(speculation=EVERYTHING)
        served.speculation.drafter = ScriptedDrafter(
            lambda seq: whole.token_ids[seq.num_generated :], served.vocab_size, 1.0, 1, depth
        )
        found = answer(served, **given)
        assert found.outputs == plain.outputs
        assert found.metrics.num_generated_tokens == plain.metrics.num_generated_tokens
        assert served.scheduler.blocks.pool.num_used == 0


def test_broken_logits_end_the_answer_where_plain_decoding_would():
    class Broken:
        """The model, NaN from a token on."""

        def __init__(self, served, token):
            self.logits, self.token, self.served = served.runner.model.logits, token, served

        def __call__(self, hidden):
            logits = self.logits(hidden)
            return torch.where((logits.argmax(-1) == self.token)[:, None], torch.nan, logits)

    def answer(served, token, monkeypatch):
        monkeypatch.setattr(served.runner.model, "logits", Broken(served, token), raising=False)
        served.add("a", prompt(1, 30), greedy(30))
        served.add("b", prompt(2, 30, picture(1, (1, 4, 4))), greedy(10))
        return run(served)

    alone = served_by()
    alone.add("a", prompt(1, 30), greedy(30))
    tokens = run(alone)["a"].outputs[0].token_ids
    token = next(token for i, token in enumerate(tokens) if i > 5 and token not in tokens[:i])
    with pytest.MonkeyPatch.context() as patch:
        plain = answer(served_by(), token, patch)
    served = served_by(speculation=EVERYTHING)
    served.speculation.drafter = ScriptedDrafter(
        lambda seq: tokens[seq.num_generated :] if seq.request.request_id == "a" else [], served.vocab_size, 1.0, 1, 4
    )
    with pytest.MonkeyPatch.context() as patch:
        found = answer(served, token, patch)
    assert found["a"].outputs[0].finish_reason == "error"
    assert [found[name].outputs for name in "ab"] == [plain[name].outputs for name in "ab"]


def test_abort_and_failures_leave_nothing_behind():
    served = scripted(width=3, depth=6)
    for name in ("long", "picture", "block"):
        served.add(name, PROMPTS[name](), greedy(64))
    for _ in range(6):
        served.step()
    served.abort("long")
    forward, served.runner.model.forward = served.runner.model.forward, None
    try:
        assert {output.outputs[0].finish_reason for output in served.step()} == {"error"}
    finally:
        served.runner.model.forward = forward
    assert not served.has_work and served.scheduler.blocks.pool.num_used == 0
    check_lossless(served, PROMPTS, truth())


# Statistics and settings


def test_metrics_of_a_request():
    served = scripted(width=1, depth=4, accuracy=1.0)
    served.add("block", PROMPTS["block"](), greedy(64))
    metrics = run(served)["block"].metrics.speculation
    assert metrics.acceptance_by_position == [1.0] * 4
    assert metrics.num_decode_steps == 13 and metrics.num_accepted_tokens == 64 - 13  # the prompt's pass is one of them
    assert metrics.tokens_per_step == pytest.approx(64 / 13)
    plain = served_by()
    plain.add("block", PROMPTS["block"](), greedy(4))
    assert run(plain)["block"].metrics.speculation is None


def test_where_nothing_is_right_little_is_proposed():
    served = scripted(width=1, depth=6, accuracy=0.0)
    served.speculation.adaptive = True
    served.add("long", PROMPTS["long"](), greedy(64))
    metrics = run(served)["long"].metrics.speculation
    assert metrics.num_draft_tokens < 40 and metrics.num_drafts < 12


REFUSED = [
    ({"method": "magic"}, "SpeculationConfig.method: got 'magic'; expected one of ngram, suffix, draft_model"),
    ({"method": "draft_model"}, "SpeculationConfig.model: got None with method 'draft_model'; expected a checkpoint's"),
    ({"num_speculative_tokens": 64}, "num_speculative_tokens: got 64; expected an integer from 1 to 63"),
    ({"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "prompt_lookup_max: got 3; expected at least"),
    ({"adaptive": 1}, "SpeculationConfig.adaptive: got 1; expected True or False"),
    ({"lookahead": 3}, "EngineConfig.speculation: it has no field 'lookahead'; expected some of method"),
    ("ngrams", "EngineConfig.speculation: got 'ngrams'; expected a SpeculationConfig"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_settings_are_refused_by_name(given, message):
    with pytest.raises(ConfigError) as error:
        served_by(speculation=given)
    assert message in str(error.value)


def test_it_is_on_where_bits_hold_and_off_elsewhere():
    assert engine().speculation is not None
    assert engine(speculation=None).speculation is None
    assert engine(invariant=False).speculation is None
    assert engine(backends="eager").speculation is None


def test_a_draft_is_cut_by_tokens_and_depth():
    draft = Draft([5, 6, 7, 8, 9], [0, 1, 1, 0, 4], [0.5, 0.4, 0.1, 0.3, 0.2], 3)
    assert draft.trimmed(9, 9) is draft
    assert draft.trimmed(9, 1) == Draft([5, 8], [0, 0], [0.5, 0.3], 3)
    assert draft.trimmed(2, 9) == Draft([5, 6], [0, 1], [0.5, 0.4], 3)
    assert len(draft.trimmed(0, 9)) == len(draft.trimmed(-1, 9)) == len(draft.trimmed(9, 0)) == 0
    assert branch_length([-1, 0, 1, 1]) == 3 and branch_length([]) == 0
    assert branch_masks([-1, 0, 0, 2]) == [0b1, 0b11, 0b101, 0b1101]
    assert branch_masks(range(-1, 63))[63] == -1
