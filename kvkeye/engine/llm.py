"""The engine for scripts: ask, wait, read. Threads may share one `LLM`; their requests run in the same batches."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from kvkeye.engine.config import EngineConfig
from kvkeye.engine.engine import Engine
from kvkeye.engine.fair_lock import FairLock
from kvkeye.engine.lookahead import Lookahead
from kvkeye.engine.outputs import Delta, OnStage, RequestOutput, deltas
from kvkeye.engine.prepare import Message, Prepared, PromptLike, is_conversation
from kvkeye.engine.request import SamplingParams
from kvkeye.engine.stats import EngineStats
from kvkeye.errors import RequestError

Sampling = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A checkpoint ready to answer.

    `LLM(folder, max_model_len=8192)` takes the fields of EngineConfig as keywords. No thread outlives a call: whoever
    waits for an answer runs the steps, for all threads that wait. Only while a list of prompts with media is answered,
    a few threads prepare the next of them.
    """

    def __init__(self, model: str = "", *, engine: Engine | None = None, **config: Any) -> None:
        self._engine: Engine | None = engine or Engine.from_config(EngineConfig(model=model, **config))
        self._owned = None if engine else self._engine
        self._lock = FairLock()
        # Latest snapshot of requests whose caller was not the one who stepped.
        self._mailbox: dict[str, RequestOutput] = {}

    # Public API

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling: Sampling = None,
        *,
        mode: str | None = None,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, in order. `mode`: "think", "no_think" or None for the model's."""
        conversations: list[Any] = [messages] if is_conversation(messages) else list(messages)
        for conversation in conversations:
            if not is_conversation(conversation):
                raise RequestError(
                    f"messages: got {conversation!r:.80}; expected a list of {{'role', 'content'}}.", param="messages"
                )
        return self._run(conversations, sampling, mode, priority)

    def generate(
        self, prompts: PromptLike | list[PromptLike], sampling: Sampling = None, *, priority: int = 0
    ) -> list[RequestOutput]:
        """Continues one prompt or a list of them; a prompt is text, token ids or a processed prompt. No template."""
        is_many = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
        return self._run(prompts if is_many else [prompts], sampling, None, priority)

    def stream(
        self,
        prompt: PromptLike,
        sampling: SamplingParams | None = None,
        *,
        mode: str | None = None,
        priority: int = 0,
        on_stage: OnStage | None = None,
    ) -> Iterator[Delta]:
        """Answers one conversation or prompt piece by piece. Closing the iterator early aborts the request.

        `on_stage` is called as "start", "vision" (where there are media to encode) and "prefill" begin, before the
        first piece.
        """
        request_id = self._submit(self._live().prepare(prompt, mode), sampling, priority, on_stage)
        last: RequestOutput | None = None
        try:
            while last is None or not last.finished:
                (now,) = self._advance([request_id])
                yield from deltas(last, now)
                last = now
        finally:
            if last is None or not last.finished:
                self.abort(request_id)

    def abort(self, request_id: str) -> None:
        with self._lock:
            self._live().abort(request_id)
            self._mailbox.pop(request_id, None)

    def stats(self) -> EngineStats:
        with self._lock:
            return self._live().stats()

    @property
    def engine(self) -> Engine:
        return self._live()

    def close(self) -> None:
        """Frees the model and its caches. Requests that still run are dropped."""
        with self._lock:
            if self._owned is not None:
                self._owned.close()
            self._engine = self._owned = None
            self._mailbox.clear()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # How it runs

    def _live(self) -> Engine:
        if self._engine is None:
            raise RequestError("LLM: it was closed. Build a new one.")
        return self._engine

    def _run(self, prompts: list[Any], sampling: Sampling, mode: str | None, priority: int) -> list[RequestOutput]:
        each = _per_prompt(sampling, len(prompts))
        results: list[RequestOutput | None] = [None] * len(prompts)
        pending: dict[str, int] = {}
        # Prepared media are large: only a step's worth of requests is admitted ahead.
        window = 2 * self._live().config.max_num_seqs
        with Lookahead(self._live(), prompts, mode) as ahead:
            try:
                while True:
                    while len(pending) < window and ahead.has_more and (not pending or ahead.is_ready):
                        index = ahead.index
                        ready, on_stage = ahead.take()
                        pending[self._submit(ready, each[index], priority, on_stage)] = index
                        del ready
                    if not pending:
                        return [output for output in results if output is not None]
                    for output in self._advance(list(pending)):
                        if output.finished:
                            results[pending.pop(output.request_id)] = output
            finally:
                for request_id in pending:
                    self.abort(request_id)

    def _submit(self, ready: Prepared, sampling: SamplingParams | None, priority: int, on_stage: OnStage | None) -> str:
        request_id = uuid.uuid4().hex
        with self._lock:
            self._live().add(request_id, ready, sampling, priority=priority, on_stage=on_stage)
        return request_id

    def _advance(self, request_ids: list[str]) -> list[RequestOutput]:
        """News of these requests: what other threads' steps left, or else what a step of our own brings."""
        while True:
            with self._lock:
                news = [self._mailbox.pop(i) for i in request_ids if i in self._mailbox]
                if news:
                    return news
                for output in self._live().step():
                    self._mailbox[output.request_id] = output


def _per_prompt(sampling: Sampling, count: int) -> list[SamplingParams | None]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"sampling: got {len(sampling)} values for {count} prompts; expected one, or one per prompt.",
            param="sampling",
        )
    return list(sampling)
