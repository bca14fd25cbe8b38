"""The bundled head on the bundled tiny-keye: what users get.

Greedy answers and their logits are those of plain decoding, sampled ones follow the same distribution, and most
proposals are right.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from kvkeye.engine import Engine, EngineConfig, SamplingParams
from kvkeye.engine.loading import load_drafter
from kvkeye.train.data import questions_of
from kvkeye.train.heads.data import messages
from tests.engine.logits import check_lossless, plain_answers, preempt_often
from tests.engine.test_bits_bundled import FOLDER, loaded
from tests.engine.test_bits_bundled import pytestmark as pytestmark
from tests.engine.tiny import run

HEAD = {"method": "eagle3", "model": "tiny-keye-eagle3"}


def served_by(dtype, speculation, **config):
    base = loaded(dtype)
    values = {"model": FOLDER, "max_model_len": 1024, "num_blocks": 160, "backends": "cpp", "speculation": speculation}
    made = EngineConfig(**values | config)
    return Engine(made, base.runner.model, base.processor, drafter=load_drafter(made, base.runner.model))


@functools.cache
def descriptions(count):
    """Builders of prompts about held-out scenes, clips among them."""
    return {
        str(i): messages(scene, turn.question)
        for i, (scene, turn) in enumerate(questions_of("describe", count, "held_out"))
    }


@functools.cache
def truth(dtype):
    return plain_answers(served_by(dtype, None), prompts(dtype))


def prompts(dtype):
    return {name: functools.partial(loaded(dtype).prepare, chat) for name, chat in descriptions(5).items()}


WAYS = {
    "a batch": ({}, {}),
    "chunks of 19, few blocks": ({"max_prefill_chunk": 19, "num_blocks": 34}, {}),
    "preemption": ({"max_prefill_chunk": 33}, {"interrupt": preempt_often}),
    "cached prefixes": ({}, {"rounds": 2}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [1, 3])
def test_lossless_and_mostly_right(dtype, way, width):
    config, how = WAYS[way]
    served = served_by(dtype, HEAD | {"tree_width": width, "adaptive": False}, **config)
    counts = check_lossless(served, prompts(dtype), truth(dtype), **how)
    assert counts.tokens_per_step > 2 and counts.acceptance_by_position[0] > 0.8


def test_metrics_of_a_request():
    served = served_by("bfloat16", HEAD)
    served.add("a", prompts("bfloat16")["0"](), SamplingParams(temperature=0, max_tokens=100))
    output = run(served)["a"]
    found = output.metrics.speculation
    assert found.tokens_per_step > 2 and found.saved_ms > 0 and len(output.outputs[0].token_ids) >= 25
    assert sum(found.acceptance_by_position[:3]) > 2.4


def first_tokens(speculation, seeds, length):
    """[len(seeds), length] of one sampled answer per seed."""
    served = served_by("float32", speculation, enable_prefix_cache=True)
    prompt = prompts("float32")["0"]()
    for seed in seeds:
        params = SamplingParams(temperature=1.3, seed=seed, max_tokens=length, ignore_eos=True)
        served.add(str(seed), prompt, params)
    answers = run(served)
    return np.array([answers[str(seed)].outputs[0].token_ids for seed in seeds])


def total_variation(a, b, vocabulary):
    """Per position, half the sum of absolute differences of frequencies."""
    counts = [[np.bincount(column, minlength=vocabulary) / len(side) for column in side.T] for side in (a, b)]
    return np.abs(np.array(counts[0]) - np.array(counts[1])).sum(-1) / 2


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("width", [1, 3])
def test_sampled_answers_follow_the_distribution_of_plain_decoding(count, width):
    """Total variation between samples of other seeds, against what random halves of both together differ by."""
    length, vocabulary = 8, loaded("float32").vocab_size
    plain = first_tokens(None, range(count), length)
    drafted = first_tokens(HEAD | {"tree_width": width, "adaptive": False}, range(count, 2 * count), length)
    assert drafted.min() >= 0 and drafted.max() < vocabulary
    found = total_variation(plain, drafted, vocabulary)
    both, rng = np.concatenate([plain, drafted]), np.random.default_rng(0)
    errors = []
    for _ in range(400):
        order = rng.permutation(len(both))
        errors.append(total_variation(both[order[:count]], both[order[count:]], vocabulary))
    assert found.mean() <= np.quantile(np.mean(errors, 1), 0.995)
    assert (found <= np.max(errors, 0)).all()


def test_nan_ends_its_own_answer_alone():
    """A head beside logits that break: the answer ends where plain decoding ends it, the others go on."""

    def answers(speculation):
        served = served_by("float32", speculation)
        logits = served.runner.model.logits

        def broken(hidden):
            found = logits(hidden)
            return torch.where((found.argmax(-1) == token)[:, None], torch.nan, found)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(served.runner.model, "logits", broken, raising=False)
            for name in "012":
                served.add(name, prompts("float32")[name](), SamplingParams(temperature=0, max_tokens=60))
            return {name: output.outputs for name, output in run(served).items()}

    texts = {name: tokens for name, (tokens, _) in truth("float32").items()}
    others = set(texts["1"]) | set(texts["2"])
    token = next(token for token in texts["0"][5:20] if token not in others)
    plain, found = answers(None), answers(HEAD)
    assert found == plain
    assert [found[name][0].finish_reason for name in "012"] == ["error", "stop", "stop"]
