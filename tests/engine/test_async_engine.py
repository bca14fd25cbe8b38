"""The API for services: many coroutines, one thread; whoever leaves takes their request along."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time

import pytest

from kvkeye.engine import LLM, AsyncEngine, EngineConfig, SamplingParams
from kvkeye.errors import CapacityError, ConfigError, KvkeyeError, RequestError
from tests.engine.tiny import engine, greedy


def serve(body, **config):
    """Runs `body(engine)` in a fresh event loop on a fresh engine; afterwards no thread and no block is left."""

    async def main():
        inner = engine(**config)
        async with AsyncEngine(engine=inner) as served:
            result = await asyncio.wait_for(body(served), 60)
        inner.scheduler.check()
        assert inner.stats().num_used_blocks == 0 and not inner.has_work
        return result

    result = asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "kvkeye-engine"]
    return result


async def last(stream):
    return [output async for output in stream][-1]


async def until_idle(served):
    for _ in range(500):
        stats = served.stats()
        if not (stats.num_running or stats.num_waiting):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests are still running")


def test_many_coroutines_get_the_answers_of_the_blocking_api():
    texts = [f"coroutine {i}" for i in range(12)]
    with LLM(engine=engine()) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(texts, greedy(20))]

    async def body(served):
        outputs = await asyncio.gather(*(last(served.generate(text, greedy(20))) for text in texts))
        return [output.outputs[0].token_ids for output in outputs], served.stats().num_steps

    found, num_steps = serve(body)
    assert found == expected and num_steps < 12 * 20


def test_snapshots_grow_and_the_last_is_finished():
    async def body(served):
        return [output async for output in served.generate([{"role": "user", "content": "hi"}], greedy(15))]

    outputs = serve(body)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for before, now in itertools.pairwise(outputs):
        assert now.outputs[0].text.startswith(before.outputs[0].text)
    assert len(outputs[-1].outputs[0].token_ids) == 15


def test_cancelling_the_reader_aborts_the_request():
    async def body(served):
        task = asyncio.create_task(last(served.generate("hello", greedy(400))))
        while not served.stats().num_running:
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until_idle(served)
        return served.stats().num_generated_tokens

    assert serve(body) < 400


def test_leaving_the_loop_aborts_the_request():
    async def body(served):
        stream = served.generate("hello", greedy(400))
        async for _ in stream:
            break
        await stream.aclose()
        await until_idle(served)
        return served.stats().num_generated_tokens

    assert serve(body) < 400


def test_a_timeout_ends_the_wait_and_the_request():
    async def body(served):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"not finished within 0\.1 s"):
            await last(served.generate("hello", greedy(480), timeout=0.1))
        assert time.monotonic() - start < 5
        await until_idle(served)

    serve(body)


def test_abort_by_name_gives_the_reader_a_last_snapshot():
    async def body(served):
        task = asyncio.create_task(last(served.generate("hello", greedy(400), request_id="mine")))
        while not served.stats().num_running:
            await asyncio.sleep(0.005)
        await served.abort("mine")
        await served.abort("nobody")
        return await task

    output = serve(body)
    assert output.finished and output.outputs[0].finish_reason == "abort"


def test_closing_ends_all_readers():
    async def main():
        served = AsyncEngine(engine=engine(max_num_seqs=2))
        await served.start()
        tasks = [asyncio.create_task(last(served.generate(f"{i}", greedy(400)))) for i in range(5)]
        while not served.stats().num_running:
            await asyncio.sleep(0.005)
        await served.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    for result in asyncio.run(main()):
        assert isinstance(result, KvkeyeError) or result.outputs[0].finish_reason == "abort"


def test_bad_requests_reach_their_sender_only():
    async def body(served):
        good = asyncio.create_task(last(served.generate("good", greedy(30))))
        with pytest.raises(RequestError, match="holds 512"):
            await last(served.generate("x" * 600, greedy(5)))
        with pytest.raises(RequestError, match="NoneType"):
            await last(served.generate(None, greedy(5)))
        with pytest.raises(RequestError, match="finite"):
            await last(served.generate("x", SamplingParams(temperature=float("nan"))))
        return await good

    assert serve(body).outputs[0].finish_reason == "length"


def test_a_name_can_be_used_once_at_a_time():
    async def body(served):
        first = asyncio.create_task(last(served.generate("a", greedy(30), request_id="x")))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="already running"):
            await last(served.generate("b", greedy(3), request_id="x"))
        await first
        return await last(served.generate("b", greedy(3), request_id="x"))

    assert serve(body).finished


def test_urgent_requests_overtake():
    async def body(served):
        order = []

        async def ask(name, priority):
            await last(served.generate(name, greedy(20), priority=priority))
            order.append(name)

        slow = asyncio.create_task(ask("slow", 0))
        while not served.stats().num_running:
            await asyncio.sleep(0.002)
        await asyncio.gather(slow, ask("waits", 0), ask("urgent", -1))
        return order

    assert serve(body, max_num_seqs=1)[0] == "urgent"


def test_draining_finishes_what_runs_and_admits_no_more():
    async def body(served):
        task = asyncio.create_task(last(served.generate("a", greedy(30))))
        await asyncio.sleep(0.01)
        draining = asyncio.create_task(served.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="draining"):
            await last(served.generate("b", greedy(3)))
        assert await draining
        return await task

    assert serve(body).outputs[0].finish_reason == "length"


def test_a_dead_thread_is_reported_to_everybody():
    async def main():
        inner = engine()
        served = AsyncEngine(engine=inner)
        await served.start()
        inner.scheduler.schedule = None  # a bug of our own, not of a request
        with pytest.raises(KvkeyeError, match="thread stopped"):
            await last(served.generate("a", greedy(3)))
        assert not served.is_healthy
        with pytest.raises(KvkeyeError, match="thread stopped"):
            await last(served.generate("b", greedy(3)))
        await served.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_checkpoint_that_cannot_be_loaded_is_reported_by_start(tmp_path):
    async def main():
        served = AsyncEngine(EngineConfig(model=str(tmp_path / "nowhere")))
        for _ in range(2):
            with pytest.raises(ConfigError, match="nowhere"):
                await served.start()
        await served.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_it_must_be_started_and_not_closed():
    async def main():
        served = AsyncEngine(engine=engine())
        with pytest.raises(RequestError, match="start"):
            await last(served.generate("a", greedy(1)))
        await served.start()
        await served.start()
        await served.close()
        await served.close()
        with pytest.raises(RequestError, match="close"):
            await last(served.generate("a", greedy(1)))

    asyncio.run(main())
