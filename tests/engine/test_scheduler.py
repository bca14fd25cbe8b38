"""The scheduler's promises one by one, on exact plans; test_state_machine.py covers their combinations."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvkeye.engine.block_manager import BlockManager
from kvkeye.engine.limits import Limits
from kvkeye.engine.request import MediaSpan, Request, SamplingParams, State
from kvkeye.engine.scheduler import ERROR_TOKEN, Scheduler
from kvkeye.errors import CapacityError, RequestError
from tests.engine.toy import ToyModel, expected_tokens

P = 4


def build(num_blocks=32, cache=True, **limits):
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64} | limits
    scheduler = Scheduler(Limits(**limits), BlockManager(num_blocks, P, enable_prefix_cache=cache))
    return scheduler, ToyModel(num_blocks, P)


def submit(scheduler, name, prompt, max_tokens=8, n=1, **fields):
    request = Request(name, list(prompt), SamplingParams(n=n), max_tokens, **fields)
    scheduler.add(request)
    return request


def step(scheduler, model):
    """One planned and computed step: {request id: (start, tokens computed, tokens drawn)}."""
    plan = scheduler.schedule()
    names = [(scheduler.sequence(row.seq_id).request.request_id, row) for row in plan.rows]
    scheduler.finish(plan, model.run(scheduler, plan))
    scheduler.check()
    return [(name, row.start, len(row.tokens), row.num_samples) for name, row in names]


def run(scheduler, model):
    while scheduler.has_work:
        step(scheduler, model)


def test_decoding_rows_go_first_and_prompts_fill_the_budget():
    scheduler, model = build(max_num_batched_tokens=10)
    submit(scheduler, "a", range(6))
    assert step(scheduler, model) == [("a", 0, 6, 1)]
    submit(scheduler, "b", range(10, 30))
    assert step(scheduler, model) == [("a", 6, 1, 1), ("b", 0, 9, 0)]
    assert step(scheduler, model) == [("a", 7, 1, 1), ("b", 9, 9, 0)]
    assert step(scheduler, model) == [("a", 8, 1, 1), ("b", 18, 2, 1)]
    assert step(scheduler, model) == [("a", 9, 1, 1), ("b", 20, 1, 1)]


def test_a_chunk_limit_leaves_budget_to_others():
    scheduler, model = build(max_prefill_chunk=3)
    submit(scheduler, "a", range(7))
    submit(scheduler, "b", range(10, 12))
    assert step(scheduler, model) == [("a", 0, 3, 0), ("b", 0, 2, 1)]
    assert step(scheduler, model) == [("b", 2, 1, 1), ("a", 3, 3, 0)]


def test_seats_are_never_exceeded_and_first_come_is_first_served():
    scheduler, model = build(max_num_seqs=2)
    for name in "abc":
        submit(scheduler, name, range(3), max_tokens=2)
    assert [row[0] for row in step(scheduler, model)] == ["a", "b"]
    assert [row[0] for row in step(scheduler, model)] == ["a", "b"]
    assert [row[0] for row in step(scheduler, model)] == ["c"]


def test_lower_priority_numbers_start_earlier():
    scheduler, model = build(max_num_seqs=1)
    submit(scheduler, "late", range(3), max_tokens=1)
    submit(scheduler, "urgent", range(3), max_tokens=1, priority=-1)
    assert step(scheduler, model)[0][0] == "urgent"


def test_an_urgent_request_takes_the_seat_of_a_running_one_which_is_finished_later():
    scheduler, model = build(max_num_seqs=1)
    slow = submit(scheduler, "slow", range(5), max_tokens=6)
    step(scheduler, model)
    submit(scheduler, "urgent", range(20, 25), max_tokens=2, priority=-5)
    assert step(scheduler, model)[0][0] == "urgent"
    assert slow.sequences[0].state is State.WAITING
    run(scheduler, model)
    (seq,) = slow.sequences
    assert seq.num_preemptions == 1
    assert seq.tokens[5:] == expected_tokens(slow, 0, 6)


def test_equal_priority_never_takes_a_seat():
    scheduler, model = build(max_num_seqs=1)
    submit(scheduler, "first", range(5), max_tokens=6)
    step(scheduler, model)
    submit(scheduler, "second", range(5))
    assert step(scheduler, model)[0][0] == "first" and scheduler.num_preemptions == 0


def test_the_worst_rank_is_preempted_when_blocks_run_out():
    scheduler, model = build(num_blocks=4, cache=False)
    first = submit(scheduler, "first", range(7), max_tokens=6)
    second = submit(scheduler, "second", range(20, 27), max_tokens=6)
    step(scheduler, model)
    step(scheduler, model)
    assert step(scheduler, model) == [("first", 8, 1, 1)]
    assert second.sequences[0].state is State.WAITING and second.sequences[0].block_table == []
    run(scheduler, model)
    for request in (first, second):
        assert request.sequences[0].tokens[7:] == expected_tokens(request, 0, 6)
    assert first.sequences[0].num_preemptions == 0


@pytest.mark.parametrize("length, cached", [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_full_prefix_hit_still_computes_at_least_one_token(length, cached):
    scheduler, model = build()
    submit(scheduler, "a", range(length))
    run(scheduler, model)
    again = submit(scheduler, "b", range(length))
    assert step(scheduler, model) == [("b", cached, length - cached, 1)]
    assert again.sequences[0].num_cached == cached


def test_answers_are_cached_too():
    scheduler, model = build()
    first = submit(scheduler, "a", range(6), max_tokens=8)
    run(scheduler, model)
    follow_up = [*first.sequences[0].tokens, 9, 9]  # 13 of its 14 first tokens have keys and values
    submit(scheduler, "b", follow_up)
    assert step(scheduler, model) == [("b", 12, 4, 1)]


def test_two_same_prompts_in_one_step_share_from_the_next_one_on():
    scheduler, model = build()
    submit(scheduler, "a", range(9))
    submit(scheduler, "b", range(9))
    assert step(scheduler, model) == [("a", 0, 9, 1), ("b", 0, 9, 1)]
    submit(scheduler, "c", range(9))
    assert ("c", 8, 1, 1) in step(scheduler, model)


def test_salt_and_media_keep_equal_tokens_apart():
    scheduler, model = build()
    pads = [7] * 12
    submit(scheduler, "a", pads, media=(MediaSpan(1, 8, b"cat"),))
    step(scheduler, model)
    submit(scheduler, "dog", pads, media=(MediaSpan(1, 8, b"dog"),))
    submit(scheduler, "salted", pads, media=(MediaSpan(1, 8, b"cat"),), salt=b"tenant")
    submit(scheduler, "cat", pads, media=(MediaSpan(1, 8, b"cat"),))
    starts = {name: start for name, start, _, _ in step(scheduler, model)}
    assert (starts["dog"], starts["salted"], starts["cat"]) == (0, 0, 8)


def test_content_evicted_between_two_uses_is_computed_again():
    """A, then B over the whole pool, then A: a stale hit would change A's answer."""
    scheduler, model = build(num_blocks=6)
    first = submit(scheduler, "a", range(16), max_tokens=3)
    run(scheduler, model)
    submit(scheduler, "b", range(20, 40), max_tokens=4)
    run(scheduler, model)
    again = submit(scheduler, "c", range(16), max_tokens=3)
    run(scheduler, model)
    assert again.sequences[0].tokens == first.sequences[0].tokens
    assert again.sequences[0].tokens[16:] == expected_tokens(again, 0, 3)


def test_abort_in_the_middle_of_a_prompt_then_the_same_prompt():
    scheduler, model = build(max_prefill_chunk=5)
    submit(scheduler, "a", range(18))
    step(scheduler, model)
    assert scheduler.abort("a") and not scheduler.abort("a")
    assert scheduler.blocks.pool.num_used == 0
    again = submit(scheduler, "b", range(18), max_tokens=4)
    assert step(scheduler, model)[0][1] == 4  # the one block that was full
    run(scheduler, model)
    assert again.sequences[0].tokens[18:] == expected_tokens(again, 0, 4)


def test_abort_between_planning_and_results_is_passed_over():
    scheduler, model = build()
    request = submit(scheduler, "a", range(5))
    plan = scheduler.schedule()
    sampled = model.run(scheduler, plan)
    scheduler.abort("a")
    assert scheduler.finish(plan, sampled) == []
    assert request.sequences[0].finish_reason == "abort" and request.sequences[0].num_generated == 0
    scheduler.check()


def test_a_fork_shares_the_prompt_and_copies_only_the_block_it_writes():
    scheduler, model = build(num_blocks=16)
    request = submit(scheduler, "a", range(10), n=4, max_tokens=3, seed=5)
    assert step(scheduler, model) == [("a", 0, 10, 4)]
    assert scheduler.blocks.pool.num_used == 3
    assert len(request.sequences) == 4
    plan = scheduler.schedule()
    assert len(plan.block_copies) == 3  # the last owner writes in place
    scheduler.finish(plan, model.run(scheduler, plan))
    assert scheduler.blocks.pool.num_used == 2 + 4
    run(scheduler, model)
    for seq in request.sequences:
        assert seq.tokens[10:] == expected_tokens(request, seq.index, 3)


def test_a_fork_at_a_block_boundary_copies_nothing():
    scheduler, model = build()
    submit(scheduler, "a", range(8), n=3)
    step(scheduler, model)
    assert scheduler.schedule().block_copies == []


def test_a_fork_reserves_its_seats_before_it_happens():
    scheduler, model = build(max_num_seqs=4, max_prefill_chunk=4)
    submit(scheduler, "many", range(8), n=3)
    submit(scheduler, "two", range(8), n=2)
    submit(scheduler, "one", range(8))
    assert [row[0] for row in step(scheduler, model)] == ["many"]


def test_a_row_without_valid_probabilities_ends_alone():
    scheduler, model = build()
    bad = submit(scheduler, "bad", range(9))
    good = submit(scheduler, "good", range(20, 29), max_tokens=3)
    plan = scheduler.schedule()
    sampled = model.run(scheduler, plan)
    sampled[plan.rows[0].seq_id] = [ERROR_TOKEN]
    assert bad.sequences[0] in scheduler.finish(plan, sampled)
    assert bad.sequences[0].finish_reason == "error"
    run(scheduler, model)
    assert good.sequences[0].tokens[9:] == expected_tokens(good, 0, 3)
    assert scheduler.blocks.pool.match(bad.sequences[0].block_hashes) == []


def test_a_failed_step_ends_its_rows_and_leaves_the_rest():
    scheduler, model = build(max_num_seqs=1)
    lost = submit(scheduler, "lost", range(9))
    kept = submit(scheduler, "kept", range(9), max_tokens=2)
    scheduler.fail(scheduler.schedule())
    assert lost.sequences[0].finish_reason == "error"
    scheduler.check()
    assert scheduler.blocks.pool.num_used == 0 and scheduler.blocks.pool.num_cached == 0
    run(scheduler, model)
    assert kept.sequences[0].tokens[9:] == expected_tokens(kept, 0, 2)


def test_stop_tokens_and_ends_of_sentences():
    scheduler, model = build()
    probe = submit(scheduler, "probe", range(5), max_tokens=3)
    run(scheduler, model)
    third = probe.sequences[0].tokens[7]
    stopped = submit(scheduler, "eos", range(5), max_tokens=8, eos_token_ids=frozenset([third]))
    run(scheduler, model)
    assert stopped.sequences[0].finish_reason == "stop" and stopped.sequences[0].num_generated <= 3
    request = Request("go on", list(range(5)), SamplingParams(ignore_eos=True), 8, eos_token_ids=frozenset([third]))
    scheduler.add(request)
    run(scheduler, model)
    assert request.sequences[0].finish_reason == "length" and request.sequences[0].num_generated == 8


def test_what_can_never_run_is_refused_with_the_numbers():
    scheduler, _ = build(num_blocks=4, max_model_len=20, max_num_seqs=2)
    cases = [
        ({"prompt": range(20), "max_tokens": 1}, RequestError, "20 prompt tokens .* 21; the context holds 20"),
        ({"prompt": range(14), "max_tokens": 7}, RequestError, "14 prompt tokens .* 7 new tokens = 21"),
        ({"prompt": []}, RequestError, "empty"),
        ({"prompt": range(2), "n": 3}, RequestError, "max_num_seqs is 2"),
        ({"prompt": range(14), "max_tokens": 4}, CapacityError, "5 KV blocks of 4; there are 4"),
    ]
    for fields, error, words in cases:
        with pytest.raises(error, match=words):
            submit(scheduler, "a", **fields)
    assert not scheduler.has_work
    submit(scheduler, "a", range(4))
    with pytest.raises(RequestError, match="already running"):
        submit(scheduler, "a", range(4))


def test_scheduling_imports_no_torch():
    code = (
        "import sys, kvkeye.engine.scheduler, kvkeye.engine.prefix_cache, kvkeye.host, kvkeye.engine, kvkeye\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
