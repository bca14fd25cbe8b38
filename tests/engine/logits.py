"""Every logit of some greedy answers, by request: what the tests of equal bits compare.

`plain_answers` and `speculative_answers` are the two sides of lossless speculation.
"""

from __future__ import annotations

import torch

from tests.engine.scripted import ScriptedDrafter
from tests.engine.tiny import greedy

NUM_TOKENS = 64


def logits_of(served, prompts, rounds=1, interrupt=None):
    """{name: logits [64, V]} of the last of `rounds` over one engine; `interrupt(engine, count)` before each step."""
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
    return answers


def preempt_often(served, count):
    """Takes blocks from some row every few steps, and some content from the cache.

    Not for ever: without a prefix cache a long prompt in small chunks would never come to its end.
    """
    running = served.scheduler.running
    if running and count % 5 == 3 and count < 300:
        served.scheduler.preempt(running[count % len(running)])
        served.scheduler.blocks.pool.evict(count % 3)


def plain_answers(served, prompts):
    """{name: (tokens, logits [64, V])}, one token a step."""
    assert served.speculation is None
    logits = logits_of(served, prompts)
    return {name: (rows.argmax(-1).tolist(), rows) for name, rows in logits.items()}


def script_of(answers, vocabulary, **settings):
    """A drafter that knows these answers; requests are found by their names."""

    def coming(seq):
        return answers[seq.request.request_id][0][seq.num_generated : seq.num_generated + 8]

    return ScriptedDrafter(coming, vocabulary, **settings)


def check_lossless(served, prompts, answers, **how):
    """Tokens and logits of every position are those of `answers`, bit for bit; returns the speculation's counts."""
    for name, logits in logits_of(served, prompts, **how).items():
        assert torch.equal(logits, answers[name][1]), name
    return served.stats().speculation
