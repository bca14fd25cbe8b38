"""Decodes and resizes the media of coming requests in a few threads, while others wait or run.

Knows ranks, bytes and a function that prepares; must not know engines. Jobs begin in the order of (priority, arrival).
They pause while the pixels that wait for their first step take more than a limit; only what is being prepared at that
moment comes on top of it. Each thread uses one core: two items side by side instead of one faster, and the threads that
run the steps keep theirs.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvkeye.engine.prepare import Prepared

Prepare = Callable[[Any, str | None], Prepared]


@dataclass(eq=False)
class Job:
    """One prompt on its way. `future` gives the Prepared or what went wrong."""

    rank: tuple[int, int]
    prompt: Any
    mode: str | None
    lease: Lease
    future: Future[Prepared] = field(default_factory=Future)

    def run(self, prepare: Prepare) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            ready = prepare(self.prompt, self.mode)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.lease.charge(ready.num_media_bytes)
            self.future.set_result(ready)


class PrepareQueue:
    """Up to `num_threads` threads, started when they are needed; `close` ends them."""

    def __init__(self, prepare: Prepare, num_threads: int, max_waiting_bytes: int) -> None:
        self.num_waiting_bytes = 0
        self._prepare = prepare
        self._max_threads = num_threads
        self._max_waiting_bytes = max_waiting_bytes
        self._news = threading.Condition()
        self._jobs: list[Job] = []  # in rank order
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._num_submitted = 0
        self._is_closed = False

    def lease(self) -> Lease:
        """For one request: to be released when its first step begins, or when it will never come."""
        return Lease(self)

    def submit(self, prompt: Any, mode: str | None, priority: int, lease: Lease) -> Job:
        """Queues a prompt. Lower `priority` begins earlier."""
        with self._news:
            if self._is_closed:
                raise RuntimeError("PrepareQueue: it was closed")
            job = Job((priority, self._num_submitted), prompt, mode, lease)
            self._num_submitted += 1
            insort(self._jobs, job, key=lambda other: other.rank)
            if self._num_idle < len(self._jobs) and len(self._threads) < self._max_threads:
                self._threads.append(_start(self._work, f"kvkeye-prepare-{len(self._threads)}"))
            self._news.notify()
        return job

    def discard(self, job: Job) -> None:
        """Takes a job out if it has not begun."""
        with self._news:
            if job in self._jobs:
                self._jobs.remove(job)
        job.future.cancel()

    def close(self, wait: bool = True) -> None:
        """Drops what has not begun. With `wait`, returns when the threads have ended."""
        with self._news:
            self._is_closed = True
            jobs, self._jobs = self._jobs, []
            self._news.notify_all()
        for job in jobs:
            job.future.cancel()
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.run(self._prepare)
            del job  # the pixels are the request's alone now

    def _next(self) -> Job | None:
        """The best job when it may begin; None when the queue closes."""
        with self._news:
            self._num_idle += 1
            while not self._is_closed and not (self._jobs and self._has_room()):
                self._news.wait()
            self._num_idle -= 1
            return None if self._is_closed else self._jobs.pop(0)

    def _has_room(self) -> bool:
        return self.num_waiting_bytes == 0 or self.num_waiting_bytes < self._max_waiting_bytes

    def _add(self, num_bytes: int) -> None:
        with self._news:
            self.num_waiting_bytes += num_bytes
            if num_bytes < 0:
                self._news.notify_all()


def _start(work: Callable[[], None], name: str) -> threading.Thread:
    """Starts a thread that computes alone, without a team of OpenMP threads of its own.

    Idle teams slow down those of other threads (see AsyncEngine). torch keeps the number per thread, but new threads
    begin with the last one set, so it is set back here.
    """
    is_alone = threading.Event()

    def run() -> None:
        torch.get_num_threads()  # takes over the last number set; done later, it would undo the next line
        torch.set_num_threads(1)
        is_alone.set()
        work()

    num_threads = torch.get_num_threads()
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    is_alone.wait()
    torch.set_num_threads(num_threads)
    return thread


class Lease:
    """The share of one request in the pixels that wait."""

    def __init__(self, queue: PrepareQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._is_open = True

    def charge(self, num_bytes: int) -> None:
        with self._lock:
            if self._is_open:
                self._num_bytes += num_bytes
                self._queue._add(num_bytes)

    def release(self) -> None:
        """May be called at any time, by any thread, more than once."""
        with self._lock:
            self._is_open = False
            num_bytes, self._num_bytes = self._num_bytes, 0
            if num_bytes:
                self._queue._add(-num_bytes)
