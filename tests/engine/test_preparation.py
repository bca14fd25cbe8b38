"""Preparation beside the steps: order, limits and cancellation of the queue; what both APIs make of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
import torch

from kvkeye.engine import LLM, AsyncEngine, SamplingParams
from kvkeye.engine.prepare import Prepared, has_media
from kvkeye.engine.prepare_queue import PrepareQueue
from kvkeye.errors import MediaError
from tests.engine.tiny import Processor, engine, greedy, picture, prompt

PATIENCE = 30  # seconds until a test gives up; nothing here takes one of them


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def conversation(seed, **options):
    return [{"role": "user", "content": [{"type": "image", "image": seed, **options}]}]


class Camera(Processor):
    """Makes a picture of a seed. Its gates hold pictures back; `seen` lists seeds in the order of their beginning."""

    def __init__(self):
        super().__init__()
        self.gates = {}
        self.seen = []

    def process(self, messages, mode=None):
        if isinstance(messages[0]["content"], str):
            return super().process(messages, mode)
        seed = messages[0]["content"][0]["image"]
        self.seen.append(seed)
        if seed in self.gates:
            assert self.gates[seed].wait(PATIENCE)
        if seed < 0:
            raise MediaError(f"picture {seed}: broken")
        return prompt(seed, 12, picture(seed, (1, 4, 6)), is_chat=True)


def camera_engine(**config):
    served = engine(**config)
    served.processor = Camera()
    return served


@contextlib.contextmanager
def queue_of(prepare, num_threads=1, limit=1 << 40):
    queue = PrepareQueue(prepare, num_threads, limit)
    try:
        yield queue
    finally:
        queue.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvkeye-prepare")]


def pixels(count=24):
    """A prepared prompt of 588 * 4 bytes per patch."""
    return prompt(1, 9, picture(1, (1, 2, count // 2)))


PATCH = 588 * 4


def test_jobs_begin_by_priority_then_arrival():
    gate, seen = threading.Event(), []

    def prepare(name, mode):
        seen.append(name)
        assert gate.wait(PATIENCE)
        return pixels()

    with queue_of(prepare) as queue:
        jobs = [queue.submit("first", None, 5, queue.lease())]
        until(lambda: seen)
        ranks = (("late", 2), ("a", 0), ("b", 0), ("urgent", -1))
        jobs += [queue.submit(name, None, priority, queue.lease()) for name, priority in ranks]
        gate.set()
        for job in jobs:
            job.future.result(PATIENCE)
    assert seen == ["first", "urgent", "a", "b", "late"]


def test_preparation_pauses_while_too_many_pixels_wait():
    seen = []

    def prepare(name, mode):
        seen.append(name)
        return pixels(24)

    with queue_of(prepare, num_threads=2, limit=30 * PATCH) as queue:
        leases = [queue.lease() for _ in range(6)]
        jobs = [queue.submit(i, None, 0, lease) for i, lease in enumerate(leases)]
        until(lambda: jobs[0].future.done() and jobs[1].future.done())
        time.sleep(0.05)
        assert len(seen) <= 3 and queue.num_waiting_bytes == 24 * PATCH * len(seen)  # two threads may both have begun
        for lease, job in zip(leases, jobs):
            job.future.result(PATIENCE)
            lease.release()
            lease.release()
        assert sorted(seen) == list(range(6)) and queue.num_waiting_bytes == 0


def test_what_is_larger_than_the_limit_goes_alone():
    with queue_of(lambda name, mode: pixels(24), limit=0) as queue:
        for _ in range(3):
            lease = queue.lease()
            queue.submit("x", None, 0, lease).future.result(PATIENCE)
            assert queue.num_waiting_bytes == 24 * PATCH
            lease.release()
            assert queue.num_waiting_bytes == 0


def test_a_lease_that_ended_early_is_never_charged():
    gate = threading.Event()

    def prepare(name, mode):
        assert gate.wait(PATIENCE)
        return pixels()

    with queue_of(prepare) as queue:
        lease = queue.lease()
        job = queue.submit("x", None, 0, lease)
        lease.release()
        gate.set()
        job.future.result(PATIENCE)
        assert queue.num_waiting_bytes == 0


def test_discarded_and_closed_jobs_never_begin():
    gate, seen = threading.Event(), []

    def prepare(name, mode):
        seen.append(name)
        assert gate.wait(PATIENCE)
        return pixels()

    with queue_of(prepare) as queue:
        first, second, third = (queue.submit(i, None, 0, queue.lease()) for i in range(3))
        until(lambda: seen)
        queue.discard(second)
        threading.Timer(0.05, gate.set).start()
        queue.close()
        assert first.future.done() and second.future.cancelled() and third.future.cancelled()
    assert seen == [0]


def test_errors_reach_who_waits_and_the_thread_goes_on():
    def prepare(name, mode):
        if name == "bad":
            raise MediaError("broken")
        return pixels()

    with queue_of(prepare) as queue:
        bad, good = (queue.submit(name, None, 0, queue.lease()) for name in ("bad", "good"))
        with pytest.raises(MediaError, match="broken"):
            bad.future.result(PATIENCE)
        assert isinstance(good.future.result(PATIENCE), Prepared)


def test_preparation_takes_one_core_and_leaves_the_others_alone():
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        with queue_of(lambda name, mode: found.append(torch.get_num_threads()) or pixels()) as queue:
            queue.submit("x", None, 0, queue.lease()).future.result(PATIENCE)
            later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            later.start()
            later.join()
            assert [*found, torch.get_num_threads()] == [1, 2, 2]
    finally:
        torch.set_num_threads(before)


def test_only_media_are_worth_a_thread():
    assert has_media(conversation(1))
    assert not any(map(has_media, ("text", [1, 2], [{"role": "user", "content": "text"}], None, pixels())))


# AsyncEngine


def serve(body, **config):
    async def main():
        inner = camera_engine(**config)
        async with AsyncEngine(engine=inner) as served:
            result = await asyncio.wait_for(body(served, inner.processor), 2 * PATIENCE)
            assert served._queue.num_waiting_bytes == 0
        inner.scheduler.check()
        return result

    result = asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvkeye")]
    return result


async def last(stream):
    return [output async for output in stream][-1]


async def sleep_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


def test_stuck_pictures_delay_neither_text_nor_answers_under_way():
    async def body(served, camera):
        camera.gates = {seed: threading.Event() for seed in (1, 2)}
        stuck = [asyncio.create_task(last(served.generate(conversation(seed), greedy(3)))) for seed in (1, 2)]
        await sleep_until(lambda: camera.seen == [1, 2])  # both threads are taken
        text = await last(served.generate("text", greedy(20)))
        assert not any(task.done() for task in stuck)
        for gate in camera.gates.values():
            gate.set()
        return [text, *await asyncio.gather(*stuck)]

    assert [len(output.outputs[0].token_ids) for output in serve(body)] == [20, 3, 3]


def test_a_reader_that_leaves_before_its_turn_costs_nothing():
    async def body(served, camera):
        camera.gates = {1: threading.Event()}
        first = asyncio.create_task(last(served.generate(conversation(1), greedy(3))))
        await sleep_until(lambda: camera.seen == [1])
        second = asyncio.create_task(last(served.generate(conversation(2), greedy(3))))
        with pytest.raises(TimeoutError, match="not finished within"):
            await last(served.generate(conversation(3), greedy(3), timeout=0.05))
        await asyncio.sleep(0.01)
        second.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await second
        camera.gates[1].set()
        await first
        await last(served.generate(conversation(4), greedy(3)))
        return camera.seen

    assert serve(body, num_prepare_threads=1) == [1, 4]


def test_pixels_count_as_waiting_until_their_first_step():
    async def body(served, camera):
        slow = asyncio.create_task(last(served.generate("long", greedy(480))))
        await sleep_until(lambda: served.stats().num_running)
        waiting = [asyncio.create_task(last(served.generate(conversation(seed), greedy(2)))) for seed in range(4)]
        await sleep_until(lambda: served._queue.num_waiting_bytes)
        await asyncio.sleep(0.02)
        assert len(camera.seen) == 1 and not slow.done(), "a second picture was prepared for a full engine"
        return await asyncio.gather(*waiting, slow)

    outputs = serve(body, max_num_seqs=1, prepared_media_memory=1, num_prepare_threads=1)
    assert [output.finished for output in outputs] == [True] * 5


def test_broken_pictures_reach_their_sender_only():
    async def body(served, camera):
        good = asyncio.create_task(last(served.generate(conversation(1), greedy(30))))
        with pytest.raises(MediaError, match="picture -5: broken"):
            await last(served.generate(conversation(-5), greedy(3)))
        return await good

    assert serve(body).outputs[0].finish_reason == "length"


# LLM


def test_the_next_pictures_are_prepared_while_steps_run():
    """The second picture is ready only after the first answer has gained tokens: one after the other would hang."""
    served = camera_engine()
    gate = served.processor.gates[2] = threading.Event()
    run = served.runner.run

    def spy(batch):
        if served.stats().num_steps > 5:
            gate.set()
        return run(batch)

    served.runner.run = spy
    with LLM(engine=served) as llm:
        outputs = llm.chat([conversation(1), conversation(2), conversation(3)], greedy(20))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20] * 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvkeye")]


def test_order_and_seeds_are_those_of_one_after_the_other():
    sampling = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    with LLM(engine=camera_engine(backends="cpp", max_num_seqs=2)) as llm:
        expected = llm.generate([llm.engine.prepare(conversation(seed)) for seed in range(9)], sampling)
    with LLM(engine=camera_engine(backends="cpp", max_num_seqs=2, prepared_media_memory=0)) as llm:
        outputs = llm.chat([conversation(seed) for seed in range(9)], sampling)
        assert sorted(llm.engine.processor.seen) == list(range(9))
    assert [output.outputs[0].token_ids for output in outputs] == [e.outputs[0].token_ids for e in expected]


def test_a_broken_picture_among_good_ones_leaves_nothing_behind():
    with LLM(engine=camera_engine(num_prepare_threads=1)) as llm:
        with pytest.raises(MediaError, match="picture -1: broken"):
            llm.chat([conversation(1), conversation(-1), conversation(2)], greedy(50))
        stats = llm.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        assert llm.chat(conversation(2), greedy(2))[0].finished
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kvkeye")])


def test_a_stream_tells_of_its_stages():
    stages = []
    with LLM(engine=camera_engine()) as llm:
        pieces = list(llm.stream(conversation(1), greedy(3), on_stage=stages.append))
    assert stages == ["start", "vision", "prefill"] and len(pieces) == 3
