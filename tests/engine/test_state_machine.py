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
from kvkeye.engine.encoder_cache import EncoderCache
from kvkeye.engine.limits import Limits
from kvkeye.engine.request import MediaSpan, Request, SamplingParams, State
from kvkeye.engine.scheduler import ERROR_TOKEN, Scheduler
from kvkeye.errors import KvkeyeError
from tests.engine.scripted import ScriptedDrafter
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

    def __init__(
        self,
        pool: str,
        num_blocks: int,
        max_num_seqs: int,
        budget: int,
        chunk: int | None,
        patches: int,
        idle: int,
        tree: tuple[int, int, float] | None = None,
    ) -> None:
        limits = Limits(max_num_seqs, budget, 48, chunk, max_num_encoder_patches=patches)
        blocks = BlockManager(num_blocks, BLOCK_SIZE, pool=POOLS[pool](num_blocks))
        drafter = None
        if tree is not None:
            width, depth, accuracy = tree
            drafter = ScriptedDrafter(coming_tokens, VOCAB, accuracy, width, depth)
        self.scheduler = Scheduler(limits, blocks, EncoderCache(idle), drafter)
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

    def step(self, between=lambda: None, fail: str = "", poison: int | None = None) -> None:
        """`between` runs after planning; `fail` is a crash of that pass; `poison` is a row with NaN logits."""
        num_preemptions = self.scheduler.num_preemptions
        prompts = [seq for seq in self.scheduler.running if seq.num_remaining > 1 or seq.num_generated == 0]
        best = prompts[0] if prompts else None
        step = self.scheduler.schedule()
        limits = self.scheduler.limits
        assert step.num_tokens <= limits.max_num_batched_tokens
        assert sum(max(1, row.num_samples) for row in step.rows) <= limits.max_num_seqs
        assert all(len(row.tokens) >= 1 for row in step.rows)
        patches = sum(encoding.num_patches for encoding in step.encodings)
        assert patches <= limits.max_num_encoder_patches or len(step.encodings) == 1
        if self.scheduler.has_work:
            assert not step.is_empty or self.scheduler.num_preemptions > num_preemptions, "there is work, nothing runs"
        self.check_media_get_their_turn(step, best)
        step = self.encode(step, fail == "encoder")
        if fail == "decoder":
            self.note(self.scheduler.fail(step))
            self.forget()
            return
        sampled = self.model.run(self.scheduler, step)
        if poison is not None and step.rows:
            row = step.rows[poison % len(step.rows)]
            sampled[row.seq_id] = sampled[row.seq_id][:-1] if row.parents else []
            sampled[row.seq_id] += [ERROR_TOKEN] * row.num_samples
        between()
        self.note(self.scheduler.finish(step, sampled))
        self.forget()
        self.events["forks"] += sum(row.num_samples > 1 for row in step.rows)
        self.events["copies"] += len(step.block_copies)
        self.events["rows"] += len(step.rows)
        drafted = [row for row in step.rows if row.parents]
        self.events["drafts"] += len(drafted)
        self.events["trees"] += sum(row.is_branched for row in drafted)
        self.events["accepted"] += sum(len(sampled[row.seq_id]) - 1 for row in drafted)
        self.events["rejected"] += sum(len(sampled[row.seq_id]) == 1 for row in drafted)

    def encode(self, step, fail: bool):
        """Encodes, or crashes; the rows that may still run."""
        lost = []
        if fail:
            lost = self.scheduler.fail_encodings(step)
            assert bool(lost) == bool(step.encodings)
            self.note(lost)
        else:
            self.model.encode(self.scheduler, step)
            self.scheduler.finish_encodings(step)
        self.events["encoded"] += len(step.encodings)
        self.events["packs"] += len({encoding.seq_id for encoding in step.encodings}) > 1
        return step.without(lost)

    def check_media_get_their_turn(self, step, best) -> None:
        """If anything is encoded and the best running prompt lacks something, then that came first."""
        if best is None or best.state is not State.RUNNING or not step.encodings:
            return
        if not self.scheduler.has_embeddings(best):
            ranks = [self.scheduler.sequence(encoding.seq_id).rank for encoding in step.encodings]
            assert min(ranks) == best.rank, "the best row waits while others encode"

    def forget(self) -> None:
        dropped = self.scheduler.encoder.take_dropped()
        self.events["dropped"] += len(dropped)
        self.model.embeds -= dropped

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
        self.forget()
        encoder = scheduler.encoder
        assert self.model.embeds == set(encoder._entries), "embeddings are kept that nobody knows, or are missing"
        in_use = {name for seq in scheduler.sequences() for name in seq.embeds}
        assert all(not seq.embeds for seq in scheduler.waiting)
        assert len(encoder) == len(in_use) + len(encoder._idle)
        for seq in scheduler.running:
            assert len(seq.block_table) == -(-seq.num_computed // BLOCK_SIZE), "blocks of proposals are kept"
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
        assert not any(entry.users for entry in self.scheduler.encoder._entries.values())


def coming_tokens(seq):
    return expected_tokens(seq.request, seq.index, seq.num_generated + 8)[seq.num_generated :]


def media(places):
    """Spans one after the other: (gap, length, name) each; what a name costs to encode is its own."""
    found, end = [], 0
    for gap, length, name in places:
        start = end + gap
        # Embeddings belong to the content: as many rows as the span has tokens, whatever surrounds it.
        found.append(MediaSpan(start, length, name, name + bytes([length]), PATCHES[name]))
        end = start + length
    return tuple(found)


PATCHES = {b"cat": 4, b"dog": 9, b"cow": 30}
spans = st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), st.sampled_from(sorted(PATCHES))), max_size=3).map(
    media
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
        patches=st.sampled_from([1, 8, 13, 100]),
        idle=st.sampled_from([0, 5, 100]),
        tree=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 8), st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    )
    def build(self, **values):
        self.world = World(**values)

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

    @rule(fail=st.sampled_from(["encoder", "decoder"]))
    def step_that_crashes(self, fail):
        self.world.step(fail=fail)

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
    world = World(
        pool,
        num_blocks=rng.choice([10, 14, 20]),
        max_num_seqs=rng.randint(2, 6),
        budget=rng.choice([5, 16, 40]),
        chunk=rng.choice([None, 3]),
        patches=rng.choice([1, 10, 40]),
        idle=rng.choice([0, 8, 30]),
        tree=[None, (1, 4, 0.7), (3, 8, 0.8)][seed % 3],
    )
    for _ in range(700):
        action = rng.random()
        if action < 0.25 and len(world.scheduler.waiting) < 8:
            places = [(rng.randrange(4), rng.randint(1, 7), rng.choice(sorted(PATCHES))) for _ in range(3)]
            world.submit(
                text=rng.randrange(3),
                length=rng.choice([4, 8, 12, rng.randint(1, 30)]),
                n=rng.choice([1, 1, 1, 2, 3]),
                max_tokens=rng.randint(1, 14),
                priority=rng.choice([0, 0, 0, -1, 1]),
                seed=rng.randrange(4),
                extra={"media": media(places) if rng.random() < 0.6 else [], "salt": rng.choice([b"", b"", b"t"])},
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
            world.step(fail=rng.choice(["", "", "", "decoder", "encoder"]), poison=rng.randrange(9))
        else:
            world.step()
        world.check()
    world.drain()
    assert world.events["rows"] > 500 and world.events["forks"] and world.events["copies"] and world.events["evicted"]
    if seed % 3:
        assert world.events["accepted"] > 100 and world.events["rejected"] > 50
        assert bool(world.events["trees"]) == (seed % 3 == 2)
    encoder = world.scheduler.encoder
    assert world.events["encoded"] > 20 and world.events["dropped"]
    assert world.events["packs"] or world.scheduler.limits.max_num_encoder_patches < 40
    assert encoder.num_hits or encoder.max_idle_tokens == 0
    assert world.scheduler.num_preemptions > 10
    assert any(seq.num_cached for request in world.requests for seq in request.sequences if seq.index == 0)
