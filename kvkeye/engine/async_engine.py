"""The engine for services: one thread runs the steps, a few prepare media, coroutines wait for their answers.

Installs no signal handlers and touches no event loop but that of its callers.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType

from kvkeye.engine.config import EngineConfig
from kvkeye.engine.engine import Engine
from kvkeye.engine.outputs import RequestOutput
from kvkeye.engine.prepare import Prepared, PromptLike, has_media
from kvkeye.engine.prepare_queue import Lease, PrepareQueue
from kvkeye.engine.request import SamplingParams
from kvkeye.engine.stats import EngineStats
from kvkeye.errors import CapacityError, KvkeyeError, RequestError

logger = logging.getLogger("kvkeye.engine")


class _Mailbox:
    """The latest snapshot for one waiting coroutine; a slow reader sees fewer, longer snapshots."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._item: RequestOutput | Exception | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        """Called by the engine's thread. Nothing replaces a last snapshot."""
        if isinstance(self._item, RequestOutput) and self._item.finished:
            return
        self._item = item
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop has been closed: nobody waits any more
            logger.debug("an answer found its event loop closed")

    async def get(self, deadline: float | None) -> RequestOutput:
        """The next snapshot; TimeoutError after `deadline` on the monotonic clock."""
        remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
        await asyncio.wait_for(self._news.wait(), remaining)
        self._news.clear()
        if isinstance(self._item, Exception):
            raise self._item
        if self._item is None:
            raise RuntimeError("a mailbox rang without news")
        return self._item


class AsyncEngine:
    """Serves one checkpoint to many coroutines.

        async with AsyncEngine(EngineConfig(model=folder)) as engine:
            async for output in engine.generate(messages, SamplingParams(max_tokens=64)):
                print(output.outputs[0].text)

    Cancelling the coroutine, leaving the loop early or running into `timeout` aborts the request within one step.
    """

    def __init__(self, config: EngineConfig | None = None, *, engine: Engine | None = None) -> None:
        if (config is None) == (engine is None):
            raise RequestError("AsyncEngine: pass either a config or an engine.")
        self._config = config
        self._engine = engine
        self._queue: PrepareQueue | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._commands: list[Callable[[Engine], None]] = []
        self._mailboxes: dict[str, _Mailbox] = {}
        self._is_draining = False
        self._is_closing = False
        self._failure: Exception | None = None

    # Life

    async def start(self) -> None:
        """Starts the thread, which loads the checkpoint."""
        if self._thread is not None:
            return
        started: Future[None] = Future()
        started.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, args=(started,), name="kvkeye-engine", daemon=True)
        self._thread.start()
        try:
            await asyncio.wrap_future(started)
        except Exception:
            self._thread = None
            raise

    async def drain(self, timeout: float | None = None) -> bool:
        """Admits no more and waits for what runs; False if `timeout` seconds were not enough."""
        self._is_draining = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._mailboxes:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """Aborts what runs, stops the thread and frees the model."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._queue is not None:
            # Decoding under way ends with the processes that do it.
            if self._config is not None and self._engine is not None:
                self._engine.close()
            await asyncio.to_thread(self._queue.close)
        self._engine = None

    async def __aenter__(self) -> AsyncEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def stats(self) -> EngineStats:
        return self._live()[0].stats()

    @property
    def is_healthy(self) -> bool:
        return self._failure is None and self._thread is not None and self._thread.is_alive()

    # Requests

    async def generate(
        self,
        prompt: PromptLike,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        mode: str | None = None,
        salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Snapshots of the answer to messages, text or token ids, the last one `finished`.

        Raises RequestError, MediaError or CapacityError before the first snapshot, and TimeoutError `timeout` seconds
        after the call. Media are prepared in the order of (priority, arrival); a reader that leaves before its turn
        costs nothing.
        """
        engine, queue = self._live()
        if self._is_draining:
            raise CapacityError("AsyncEngine: it is draining and admits no more requests. Ask another instance.")
        name = request_id or uuid.uuid4().hex
        if name in self._mailboxes:
            raise RequestError(f"request {name!r}: this id is already running. Choose another.", param="request_id")
        deadline = None if timeout is None else time.monotonic() + timeout
        mailbox = self._mailboxes[name] = _Mailbox()
        lease = queue.lease()
        is_finished = False
        try:
            ready = await asyncio.wait_for(_prepared(engine, queue, prompt, mode, priority, lease), timeout)
            self._post(partial(self._admit, name, mailbox, ready, sampling_params, priority, salt, lease))
            del ready  # the pixels end with the request, not with its reader
            while not is_finished:
                output = await mailbox.get(deadline)
                is_finished = output.finished
                yield output
        except asyncio.TimeoutError:
            raise TimeoutError(
                f"request {name!r}: not finished within {timeout} s, so it was aborted. Allow more, or ask for less."
            ) from None
        finally:
            self._mailboxes.pop(name, None)
            lease.release()
            if not is_finished:
                self._post(lambda e: _discard(e.abort(name)))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its reader gets a last snapshot with reason "abort"."""
        self._post(lambda engine: self._deliver(engine.abort(request_id)))

    # The engine's thread

    def _live(self) -> tuple[Engine, PrepareQueue]:
        if self._failure is not None:
            raise _stopped(self._failure)
        if self._engine is None or self._queue is None or self._thread is None or self._is_closing:
            raise RequestError("AsyncEngine: it is not running. Call start() first, and do not use it after close().")
        return self._engine, self._queue

    def _post(self, command: Callable[[Engine], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _admit(
        self,
        name: str,
        mailbox: _Mailbox,
        ready: Prepared,
        sampling: SamplingParams | None,
        priority: int,
        salt: str,
        lease: Lease,
        engine: Engine,
    ) -> None:
        if self._mailboxes.get(name) is not mailbox:  # its reader left before it arrived
            return
        try:
            engine.add(name, ready, sampling, priority=priority, salt=salt, on_stage=lambda stage: lease.release())
        except KvkeyeError as error:
            mailbox.put(error)

    def _deliver(self, output: RequestOutput | None) -> None:
        mailbox = None if output is None else self._mailboxes.get(output.request_id)
        if output is not None and mailbox is not None:
            mailbox.put(output)

    def _run(self, started: Future[None]) -> None:
        # Loading belongs to this thread as well: each thread that once computed keeps a team of OpenMP threads, and
        # where teams together outnumber the cores, those of all become slow to wake. Measured: steps of 5 ms take 15.
        try:
            engine = self._engine if self._config is None else Engine.from_config(self._config)
            if engine is None:
                raise RequestError("AsyncEngine: it was closed. Build a new one.")
            self._engine, self._queue = engine, engine.prepare_queue()
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(None)
        self._loop(engine)

    def _loop(self, engine: Engine) -> None:
        try:
            while not self._is_closing:
                self._obey(engine)
                for output in engine.step() if engine.has_work else ():
                    self._deliver(output)
            for name, mailbox in list(self._mailboxes.items()):
                mailbox.put(engine.abort(name) or RequestError("AsyncEngine: it was closed. Build a new one."))
        except Exception as error:
            logger.exception("the engine's thread stopped")
            self._failure = error
            for mailbox in list(self._mailboxes.values()):
                mailbox.put(_stopped(error))

    def _obey(self, engine: Engine) -> None:
        """Runs the commands that have come in; sleeps while there is nothing at all to do."""
        with self._wake:
            while not (self._commands or self._is_closing or engine.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command(engine)


async def _prepared(
    engine: Engine, queue: PrepareQueue, prompt: PromptLike, mode: str | None, priority: int, lease: Lease
) -> Prepared:
    """Text does not stand in line behind media."""
    if not has_media(prompt):
        return await asyncio.to_thread(engine.prepare, prompt, mode)
    job = queue.submit(prompt, mode, priority, lease)
    try:
        return await asyncio.wrap_future(job.future)
    finally:
        queue.discard(job)


def _stopped(error: Exception) -> KvkeyeError:
    return KvkeyeError(f"AsyncEngine: its thread stopped ({error}). Build a new one.")


def _discard(output: RequestOutput | None) -> None:
    """The reader has left; what an abort returns goes nowhere."""
