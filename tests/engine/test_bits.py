"""A request's logits have the same bits alone, in a batch, in chunks, from the cache and after a preemption.

Holds for the C++ kernels; nothing in the engine may spoil it. Logits are compared as tensors at every position of
answers of 64 tokens, on random weights, with pictures in some prompts.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.engine.tiny import engine, greedy, picture, prompt

NUM_TOKENS = 64
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


def logits_of(prompts, rounds=1, interrupt=None, dtype=torch.float32, version="preview", **config):
    """{name: logits [64, V]} of greedy answers in the last of `rounds` over one engine."""
    served = engine(version, dtype, **{"backends": "cpp", "max_model_len": 640} | config)
    found: dict[tuple[str, int], torch.Tensor] = {}

    def hook(names, logits):
        for (seq_id, position), row in zip(names, logits):
            found[served.scheduler.sequence(seq_id).request.request_id, position] = row.clone()

    served.runner.logits_hook = hook
    for _ in range(rounds):
        found.clear()
        for name, build in prompts.items():
            served.add(name, build(), greedy(NUM_TOKENS))
        count = 0
        while served.has_work:
            if interrupt is not None:
                interrupt(served, count)
            assert [output.error for output in served.step() if output.error] == []
            count += 1
    answers = {}
    for name in prompts:
        rows = [row for (owner, _), row in sorted(found.items(), key=lambda item: item[0][1]) if owner == name]
        assert len(rows) == NUM_TOKENS
        answers[name] = torch.stack(rows)
    return answers, served


@functools.cache
def alone(name, dtype=torch.float32, version="preview"):
    return logits_of({name: MANY[name]}, dtype=dtype, version=version, enable_prefix_cache=False)[0][name]


def check(answers, **reference):
    for name, logits in answers.items():
        assert torch.isfinite(logits).all()
        assert torch.equal(logits, alone(name, **reference)), name


@pytest.mark.parametrize("num_seqs", [2, 5, 16])
def test_in_a_batch(num_seqs):
    check(logits_of(MANY if num_seqs == 16 else PROMPTS, max_num_seqs=num_seqs)[0])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks(chunk):
    check(logits_of(PROMPTS, max_prefill_chunk=chunk)[0])


def test_in_chunks_of_whatever_the_others_leave():
    check(logits_of(PROMPTS, max_num_batched_tokens=13)[0])


@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_with_other_block_sizes(block_size):
    check(logits_of(PROMPTS, block_size=block_size)[0])


def test_from_the_prefix_cache():
    answers, served = logits_of(PROMPTS, rounds=2)
    check(answers)
    assert served.stats().num_cached_tokens >= 32 + 128


def test_after_preemption_because_blocks_ran_out():
    answers, served = logits_of(PROMPTS, num_blocks=22)
    check(answers)
    assert served.stats().num_preemptions > 1


def test_after_preemption_at_any_moment():
    def interrupt(served, count):
        running = served.scheduler.running
        if running and count % 5 == 3:
            served.scheduler.preempt(running[count % len(running)])
            served.scheduler.blocks.pool.evict(count % 3)

    answers, served = logits_of(PROMPTS, interrupt=interrupt, max_prefill_chunk=19)
    check(answers)
    assert served.stats().num_preemptions > 10


def test_with_a_small_encoder_cache():
    answers, served = logits_of(PROMPTS, rounds=2, encoder_cache_memory=0, enable_prefix_cache=False)
    check(answers)
    assert served.stats().encoder_hits == 0


def test_whatever_lies_in_unwritten_blocks():
    """Kernels may load past the end of a context; what they find there must not matter."""

    def interrupt(served, count):
        if count == 0:
            for cache in (*served.runner.k_caches, *served.runner.v_caches):
                cache.fill_(float("nan"))

    check(logits_of(PROMPTS, interrupt=interrupt)[0])


@pytest.mark.parametrize("version, dtype", [("1.5", torch.float32), ("preview", torch.bfloat16)])
def test_other_version_and_dtype(version, dtype):
    answers, _ = logits_of(PROMPTS, max_prefill_chunk=7, num_blocks=24, version=version, dtype=dtype)
    check(answers, version=version, dtype=dtype)


def test_the_media_are_seen():
    """The comparison above would hold for a model that ignores its pictures."""
    one = logits_of({"a": lambda: prompt(4, 21, picture(1, (1, 6, 10)))})[0]["a"]
    other = logits_of({"a": lambda: prompt(4, 21, picture(9, (1, 6, 10)))})[0]["a"]
    assert not torch.equal(one[0], other[0])


def test_on_two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before if before in (1, 2) else 1)
    try:
        check(logits_of(PROMPTS)[0])
    finally:
        torch.set_num_threads(before)
