"""A request's logits have the same bits alone, in a batch, in chunks, from the cache and after a preemption.

Holds for the C++ kernels; nothing in the engine may spoil it. Logits are compared as tensors at every position of
answers of 64 tokens, on random weights, with pictures in some prompts.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engine.logits import logits_of, preempt_often
from tests.engine.tiny import engine, picture, prompt

# A 1.5 clip of two frame sizes, pictures of odd aspect, one picture shared by two requests.
PROMPTS = {
    "short": lambda: prompt(1, 5),
    "block": lambda: prompt(2, 32),
    "long": lambda: prompt(3, 150),
    "two splits": lambda: prompt(7, 490),  # the answer crosses position 512, where kernels split the keys
    "picture": lambda: prompt(4, 21, picture(1, (1, 6, 10))),
    "two pictures": lambda: prompt(5, 40, picture(2, (1, 2, 2)), picture(1, (1, 6, 10))),
    "clip": lambda: prompt(6, 17, picture(3, (1, 4, 4), (1, 4, 4), (1, 2, 4), kind="video")),
}
MANY = PROMPTS | {f"more {i}": functools.partial(prompt, 100 + i, 3 + 7 * i) for i in range(10)}


def served_by(version="preview", dtype=torch.float32, **config):
    return engine(version, dtype, **{"backends": "cpp", "max_model_len": 640} | config)


@functools.cache
def alone(name, dtype=torch.float32, version="preview"):
    return logits_of(served_by(version, dtype, enable_prefix_cache=False), {name: MANY[name]})[name]


def check(answers, **reference):
    for name, logits in answers.items():
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, alone(name, **reference)), name


@pytest.mark.parametrize("num_seqs", [2, 5, 16])
def test_in_a_batch(num_seqs):
    check(logits_of(served_by(max_num_seqs=num_seqs), MANY if num_seqs == 16 else PROMPTS))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks(chunk):
    check(logits_of(served_by(max_prefill_chunk=chunk), PROMPTS))


def test_in_chunks_of_whatever_the_others_leave():
    check(logits_of(served_by(max_num_batched_tokens=13), PROMPTS))


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_with_other_block_sizes(block_size):
    check(logits_of(served_by(block_size=block_size), PROMPTS))


def test_from_the_prefix_cache():
    served = served_by()
    check(logits_of(served, PROMPTS, rounds=2))
    assert served.stats().num_cached_tokens >= 32 + 128


def test_after_preemption_because_blocks_ran_out():
    served = served_by(num_blocks=22)
    check(logits_of(served, PROMPTS))
    assert served.stats().num_preemptions > 1


def test_after_preemption_at_any_moment():
    served = served_by(max_prefill_chunk=19)
    check(logits_of(served, PROMPTS, interrupt=preempt_often))
    assert served.stats().num_preemptions > 10


def test_with_a_small_encoder_cache():
    served = served_by(encoder_cache_memory=0, enable_prefix_cache=False)
    check(logits_of(served, PROMPTS, rounds=2))
    # In each round two requests show one picture at the same time; nothing is left for the next round.
    assert (served.stats().encoder_hits, served.stats().encoder_misses) == (2, 2 * 5)


def test_whatever_lies_in_unwritten_blocks():
    """Kernels may load past the end of a context; what they find there must not matter."""

    served = served_by()
    for cache in (*served.runner.k_caches, *served.runner.v_caches):
        cache.fill_(float("nan"))
    check(logits_of(served, PROMPTS))


@pytest.mark.parametrize("version, dtype", [("1.5", torch.float32), ("preview", torch.bfloat16)])
def test_other_version_and_dtype(version, dtype):
    served = served_by(version, dtype, max_prefill_chunk=7, num_blocks=24)
    check(logits_of(served, PROMPTS), version=version, dtype=dtype)


def test_the_media_are_seen():
    """The comparison above would hold for a model that ignores its pictures."""
    prompts = (functools.partial(prompt, 4, 21, picture(seed, (1, 6, 10))) for seed in (1, 9))
    one, other = (logits_of(served_by(), {"a": build})["a"] for build in prompts)
    assert not torch.equal(one[0], other[0])


def test_on_two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before if before in (1, 2) else 1)
    try:
        check(logits_of(served_by(), PROMPTS))
    finally:
        torch.set_num_threads(before)
