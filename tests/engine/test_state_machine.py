"""Random life of the scheduler and the block pool, checked after every step against what each request must answer.

The toy model hashes what it sees through the block tables, so a stale, foreign or unwritten block changes the text.
"""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeye import _host_py
from kvkeye.engine.block_manager import BlockManager
from kvkeye.engine.request import MediaSpan, Request, SamplingParams, State
from kvkeye.engine.scheduler import ERROR_TOKEN, Limits, Scheduler
from kvkeye.errors import KvkeyeError
from tests.engine.toy import VOCAB, ToyModel, expected_tokens

try:
    from kvkeye import _host
except ImportError:
    _host = None

BLOCK_SIZE = 4
POOLS = {"python": _host_py.BlockPool} | ({"cpp": _host.BlockPool} if _host else {})
# Prompts are prefixes of a few texts, so that blocks are shared, and some stop exactly at a block's end.
TEXTS = [[(text * 7 + i * i) % VOCAB for i in range(40)] for text in range(3)]


class World:
    """Scheduler, pool and toy model; knows every request it ever saw and how it must have ended."""

    def __init__(self, pool: str, num_blocks: int, max_num_seqs: int, budget: int, chunk: int | None) -> None:
        limits = Limits(max_num_seqs, budget, max_model_len=48, max_prefill_chunk=chunk)
        blocks = BlockManager(num_blocks, BLOCK_SIZE, pool=POOLS[pool](num_blocks))
        self.scheduler = Scheduler(limits, blocks)
        self.model = ToyModel(num_blocks, BLOCK_SIZE)
        self.requests: list[Request] = []
        self.ended: Counter[int] = Counter()
        self.events: Counter[str] = Counter()

    def submit(self, text: int, length: int, n: int, max_tokens: int, priority: int, seed: int, extra: dict) -> None:
        sampling = SamplingParams(n=n, ignore_eos=extra.get("ignore_eos", False))
        request = Request(
            f"r{len(self.requests)}",
            TEXTS[text][:length],
            sampling,
            max_tokens,
            seed=seed,
            priority=priority,
            eos_token_ids=frozenset([0, 1]),
            media=tuple(span for span in extra.get("media", ()) if span.end <= length),
            salt=extra.get("salt", b""),
        )
        try:
            self.scheduler.add(request)
        except KvkeyeError:
            self.events["refused"] += 1
            assert not request.sequences
            return
        self.requests.append(request)

    def step(self, between=lambda: None, fail: bool = False, poison: int | None = None) -> None:
        """`between` runs after planning; `fail` is a crash of the forward pass; `poison` is a row with NaN logits."""
        step = self.scheduler.schedule()
        limits = self.scheduler.limits
        assert step.num_tokens <= limits.max_num_batched_tokens
        assert sum(max(1, row.num_samples) for row in step.rows) <= limits.max_num_seqs
        assert all(len(row.tokens) >= 1 for row in step.rows)
        if self.scheduler.has_work:
            assert step.rows or self.scheduler.num_preemptions, "there is work and nothing runs"
        if fail:
            self.note(self.scheduler.fail(step))
            return
        sampled = self.model.run(self.scheduler, step)
        if poison is not None and step.rows:
            row = step.rows[poison % len(step.rows)]
            sampled[row.seq_id] = [ERROR_TOKEN] * row.num_samples
        between()
        self.note(self.scheduler.finish(step, sampled))
        self.events["forks"] += sum(row.num_samples > 1 for row in step.rows)
        self.events["copies"] += len(step.block_copies)
        self.events["rows"] += len(step.rows)

    def note(self, changed) -> None:
        for seq in changed:
            if seq.state is State.FINISHED:
                self.ended[seq.seq_id] += 1
                assert self.ended[seq.seq_id] == 1, "a row ended twice"

    def abort(self, which: int) -> None:
        if self.requests:
            self.scheduler.abort(self.requests[which % len(self.requests)].request_id)

    def preempt(self, which: int) -> None:
        running = self.scheduler.running
        if running:
            self.scheduler.preempt(running[which % len(running)])

    def evict(self, count: int) -> None:
        self.events["evicted"] += self.scheduler.blocks.pool.evict(count)

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.scheduler.blocks.pool
        scheduler.check()
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_blocks
        for request in self.requests[-12:]:
            for seq in request.sequences:
                assert seq.tokens[seq.num_prompt :] == expected_tokens(request, seq.index, seq.num_generated)
                if seq.finish_reason == "length":
                    assert seq.num_generated == request.max_tokens
                if seq.finish_reason == "stop":
                    assert seq.tokens[-1] in request.eos_token_ids
                if seq.state is State.FINISHED:
                    assert not seq.block_table

    def drain(self) -> None:
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
            self.check()
        assert not self.scheduler.has_work, "some request never ends"
        assert self.scheduler.blocks.pool.num_used == 0
        assert not self.scheduler.requests and not list(self.scheduler.sequences())


spans = st.lists(
    st.builds(MediaSpan, st.integers(0, 8), st.integers(1, 8), st.sampled_from([b"cat", b"dog"])), max_size=1
)
extras = st.fixed_dictionaries(
    {"media": spans, "salt": st.sampled_from([b"", b"", b"tenant"]), "ignore_eos": st.booleans()}
)


class Machine(RuleBasedStateMachine):
    @initialize(
        pool=st.sampled_from(sorted(POOLS)),
        num_blocks=st.integers(6, 24),
        max_num_seqs=st.integers(1, 6),
        budget=st.integers(1, 24),
        chunk=st.sampled_from([None, 1, 3, 4]),
    )
    def build(self, pool, num_blocks, max_num_seqs, budget, chunk):
        self.world = World(pool, num_blocks, max_num_seqs, budget, chunk)

    @rule(
        text=st.integers(0, 2),
        length=st.one_of(st.integers(1, 30), st.sampled_from([4, 8, 16])),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        max_tokens=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        seed=st.integers(0, 3),
        extra=extras,
    )
    def submit(self, **values):
        self.world.submit(**values)

    @rule()
    def step(self):
        self.world.step()

    @rule(which=st.integers(0, 50), kind=st.sampled_from(["abort", "preempt"]))
    def step_with_an_interruption(self, which, kind):
        self.world.step(between=lambda: getattr(self.world, kind)(which))

    @rule(row=st.integers(0, 9))
    def step_with_bad_logits(self, row):
        self.world.step(poison=row)

    @rule()
    def step_that_crashes(self):
        self.world.step(fail=True)

    @rule(which=st.integers(0, 50))
    def abort(self, which):
        self.world.abort(which)

    @rule(which=st.integers(0, 9))
    def preempt(self, which):
        self.world.preempt(which)

    @rule(count=st.integers(1, 8))
    def evict(self, count):
        self.world.evict(count)

    @precondition(lambda self: self.world.requests)
    @rule()
    def drain(self):
        self.world.drain()

    @invariant()
    def conserved(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("pool", sorted(POOLS))
@pytest.mark.parametrize("seed", range(6))
def test_thousands_of_random_steps(pool, seed):
    """Long life under pressure: little memory, shared prefixes, forks, aborts and evictions in one go."""
    rng = random.Random(seed)
    world = World(pool, rng.choice([10, 14, 20]), rng.randint(2, 6), rng.choice([5, 16, 40]), rng.choice([None, 3]))
    for _ in range(700):
        action = rng.random()
        if action < 0.25 and len(world.scheduler.waiting) < 8:
            media = [MediaSpan(rng.randrange(4), rng.randint(1, 9), rng.choice([b"cat", b"dog"]))]
            world.submit(
                text=rng.randrange(3),
                length=rng.choice([4, 8, 12, rng.randint(1, 30)]),
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.randint(1, 14),
                priority=rng.choice([0, 0, 0, -1, 1]),
                seed=rng.randrange(4),
                extra={"media": media if rng.random() < 0.4 else [], "salt": rng.choice([b"", b"", b"t"])},
            )
        elif action < 0.28:
            world.abort(rng.randrange(len(world.requests) + 1))
        elif action < 0.31:
            world.preempt(rng.randrange(8))
        elif action < 0.34:
            world.evict(rng.randint(1, 6))
        elif action < 0.38:
            kind, which = rng.choice(["abort", "preempt"]), rng.randrange(100)
            world.step(between=lambda kind=kind, which=which: getattr(world, kind)(which))
        elif action < 0.40:
            world.step(fail=rng.random() < 0.3, poison=rng.randrange(9))
        else:
            world.step()
        world.check()
    world.drain()
    assert world.events["rows"] > 500 and world.events["forks"] and world.events["copies"] and world.events["evicted"]
    assert world.scheduler.num_preemptions > 10
    assert any(seq.num_cached for request in world.requests for seq in request.sequences if seq.index == 0)
