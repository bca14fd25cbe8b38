"""Prepares the prompts of a list in their order, those with media ahead of their turn in other threads."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from kvkeye.engine.engine import Engine
from kvkeye.engine.outputs import OnStage, Stage
from kvkeye.engine.prepare import Prepared, PromptLike, has_media
from kvkeye.engine.prepare_queue import Job, Lease


class Lookahead:
    """Used as a context manager: `take` the prompts one after the other; leaving it drops what has not begun.

    A prompt without media is prepared at its turn: it is quick, and batches of text stay the same from run to run.
    """

    def __init__(self, engine: Engine, prompts: list[PromptLike], mode: str | None) -> None:
        self.index = 0
        self._engine, self._prompts, self._mode = engine, prompts, mode
        self._queue = engine.prepare_queue()
        self._jobs: deque[Job | None] = deque()
        is_slow = [has_media(prompt) for prompt in prompts]
        for prompt, slow in zip(prompts, is_slow):
            # A single one has nothing to overlap with.
            ahead = slow and sum(is_slow) > 1
            self._jobs.append(self._queue.submit(prompt, mode, 0, self._queue.lease()) if ahead else None)

    @property
    def has_more(self) -> bool:
        return bool(self._jobs)

    @property
    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        job = self._jobs[0]
        return job is None or job.future.done()

    def take(self) -> tuple[Prepared, OnStage | None]:
        """The next prompt, and what to tell of its stages. Waits for it; raises what went wrong with it."""
        job, prompt = self._jobs.popleft(), self._prompts[self.index]
        self.index += 1
        if job is None:
            return self._engine.prepare(prompt, self._mode), None
        return job.future.result(), _releaser(job.lease)

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.close(wait=error is None)


def _releaser(lease: Lease) -> OnStage:
    def release(stage: Stage) -> None:
        lease.release()

    return release
