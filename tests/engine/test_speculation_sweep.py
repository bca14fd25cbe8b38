"""Thousands of prompts: every token and logit of speculative decoding against plain decoding, bit for bit.

Text, pictures and clips in random batches; every drafter, trees of widths 1 to 4 and depths 1 to 8; 64 tokens each.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch

from kvkeye.engine import Engine, EngineConfig
from kvkeye.engine.draft_head import HeadDrafter
from kvkeye.engine.draft_model import DraftModel
from kvkeye.models.draft.weights import load_head
from kvkeye.train.render import render
from kvkeye.train.scenes import sample_scene
from kvkeye.utils.assets import folder_of
from tests.engine.heads import random_head
from tests.engine.logits import check_lossless, plain_answers, preempt_often, script_of
from tests.engine.test_bits_bundled import FOLDER, QUESTIONS, loaded
from tests.engine.test_bits_bundled import pytestmark as bundled
from tests.engine.tiny import engine, picture, prompt

CHUNK = 40
EVERYTHING = {"num_speculative_tokens": 63, "adaptive": False}


def random_prompt(rng):
    """A builder, so that every run gets fresh media."""
    pictures = []
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        seed = rng.randrange(12)
        side = random.Random(seed)
        grid = (1, 2 * side.randint(1, 3), 2 * side.randint(1, 4))
        pictures.append((seed, [grid] * (1 if seed % 3 else side.randint(2, 4)), "image" if seed % 3 else "video"))
    seed, length = rng.randrange(10**6), rng.choice([3, 20, 32, 100, rng.randint(4, 200), rng.randint(440, 505)])
    return lambda: prompt(seed, length, *(picture(number, *grids, kind=kind) for number, grids, kind in pictures))


def scene_prompt(rng, prepare):
    kind = rng.choice(["objects", "text", "mixed", "clip"])
    frames = [np.asarray(frame) for frame in render(sample_scene(rng.randrange(10**6), kind, "held_out"))]
    media = {"type": "video", "video": np.stack(frames)} if kind == "clip" else {"type": "image", "image": frames[0]}
    question = rng.choice([*QUESTIONS, "Describe the picture as JSON.", "Copy the text."])
    content = (
        [{"type": "text", "text": question}] if rng.random() < 0.2 else [media, {"type": "text", "text": question}]
    )
    return functools.partial(prepare, [{"role": "user", "content": content}])


def random_way(rng):
    """Settings of an engine, and how it is disturbed."""
    config = {
        "max_num_seqs": rng.choice([1, 3, 8, 16]),
        "max_prefill_chunk": rng.choice([None, None, 7, 33]),
        "max_num_batched_tokens": rng.choice([2048, 2048, 70, 21]),
        "block_size": rng.choice([16, 32]),
        "enable_prefix_cache": rng.random() < 0.7,
    }
    return config, {"interrupt": preempt_often} if rng.random() < 0.25 else {}


def with_weights(rng, model, head):
    """A draft head, or the target itself as a draft model that does not look at media."""
    if rng.random() < 0.7:
        return HeadDrafter(head, model, width=rng.randint(1, 4), min_score=rng.choice([0.0, 0.05, 0.3]))
    return DraftModel(model, num_blocks=rng.choice([40, 200]), block_size=16, backends="cpp")


def sweep(serve, build, head, num_chunks, seed):
    """`serve(drafter, **config)` makes an engine, `build(rng)` a prompt; returns the counts of the scripted runs."""
    rng = random.Random(seed)
    counts = []
    for _ in range(num_chunks):
        prompts = {str(i): build(rng) for i in range(CHUNK)}
        plain = serve(None, speculation=None)
        answers = plain_answers(plain, prompts)
        config, how = random_way(rng)
        served = serve(None, speculation=EVERYTHING, **config)
        settings = {"width": rng.randint(1, 4), "depth": rng.randint(1, 8), "accuracy": rng.uniform(0.4, 0.9)}
        served.speculation.drafter = script_of(answers, served.vocab_size, seed=rng.randrange(99), **settings)
        counts.append(check_lossless(served, prompts, answers, **how))
        config, how = random_way(rng)
        given = {
            "method": rng.choice(["ngram", "suffix"]),
            "tree_width": rng.randint(1, 4),
            "prompt_lookup_min": rng.choice([1, 2]),
            "num_speculative_tokens": rng.choice([1, 3, 8, 20]),
            "adaptive": rng.random() < 0.5,
        }
        check_lossless(serve(None, speculation=given, **config), prompts, answers, **how)
        config, how = random_way(rng)
        given = {"num_speculative_tokens": rng.choice([1, 4, 8, 16]), "adaptive": rng.random() < 0.5}
        drafter = with_weights(rng, plain.runner.model, head)
        check_lossless(serve(drafter, speculation=given, **config), prompts, answers, **how)
    first = [count.acceptance_by_position[0] for count in counts]
    accepting = sum(share * count.num_drafts for share, count in zip(first, counts)) / sum(c.num_drafts for c in counts)
    assert 0.2 < accepting < 0.8  # of the steps; as many reject already the first proposal
    return counts


def serve_random(version, dtype, drafter, **config):
    values = {"backends": "cpp", "max_model_len": 640, "check_every_step": False} | config
    return engine(version, dtype, drafter, **values)


@pytest.mark.parametrize("version, dtype", [("preview", torch.float32), ("1.5", torch.bfloat16)])
def test_a_few_on_random_weights(version, dtype):
    serve = functools.partial(serve_random, version, dtype)
    sweep(serve, random_prompt, random_head(version, dtype), 1, seed=8)


@pytest.mark.long
@pytest.mark.parametrize("version", ["preview", "1.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_on_random_weights(version, dtype):
    serve = functools.partial(serve_random, version, dtype)
    sweep(serve, random_prompt, random_head(version, dtype), 13, seed=1)


def serve_bundled(dtype, drafter, **config):
    base = loaded(dtype)
    values = {"model": FOLDER, "max_model_len": 1024, "backends": "cpp"} | config
    return Engine(EngineConfig(**values), base.runner.model, base.processor, drafter=drafter)


@bundled
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_on_tiny_keye(dtype):
    prepare = loaded(dtype).prepare
    head = load_head(folder_of("tiny-keye-eagle3"), getattr(torch, dtype))
    sweep(functools.partial(serve_bundled, dtype), lambda rng: scene_prompt(rng, prepare), head, 13, seed=2)
