"""One step after the other: plan, compute, tell. Wires scheduler, runner and answers; not thread-safe.

`LLM` and `AsyncEngine` are the two ways to drive it.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kvkeye.engine import batch as batches
from kvkeye.engine.answer import Parser, Tracker
from kvkeye.engine.backends import serving_backends
from kvkeye.engine.batch import Prompt
from kvkeye.engine.block_manager import BlockManager
from kvkeye.engine.config import EngineConfig
from kvkeye.engine.machine import available_bytes, default_device, default_dtype
from kvkeye.engine.memory import check_weights_fit, plan_cache
from kvkeye.engine.outputs import Logprob, RequestOutput
from kvkeye.engine.prepare import Prepared, Processor, PromptLike, prepare
from kvkeye.engine.request import (
    DEFAULT_MAX_TOKENS,
    MAX_SALT_BYTES,
    Request,
    SamplingParams,
    Sequence,
    State,
)
from kvkeye.engine.runner import Runner, StepResult
from kvkeye.engine.scheduler import Limits, Scheduler, Step
from kvkeye.errors import CapacityError, RequestError
from kvkeye.models.keye.model import KeyeModel

logger = logging.getLogger("kvkeye.engine")


class TextProcessor(Processor, Protocol):
    """What the engine needs besides prompts: the way back to text, and the checkpoint's habits."""

    @property
    def eos_token_ids(self) -> Any: ...
    @property
    def generation_defaults(self) -> Mapping[str, Any]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True)
class EngineStats:
    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    encoder_hits: int
    encoder_misses: int
    encoder_bytes: int


class Engine:
    """A model being served: `add` requests, call `step` while `has_work`, read the outputs it returns."""

    def __init__(
        self,
        config: EngineConfig,
        model: KeyeModel,
        processor: TextProcessor,
        new_parser: Callable[[], Parser] | None = None,
    ) -> None:
        text = model.config.text
        plan = plan_cache(config, text, model.dtype, available_bytes(model.device))
        self.config = config
        self.processor = processor
        self.vocab_size = text.vocab_size
        self.max_model_len = plan.max_model_len
        backends = serving_backends(config, model.device)
        self.runner = Runner(model, plan.num_blocks, config.block_size, config.encoder_cache_memory, backends)
        limits = Limits(
            config.max_num_seqs, config.max_num_batched_tokens, plan.max_model_len, config.max_prefill_chunk
        )
        blocks = BlockManager(plan.num_blocks, config.block_size, config.enable_prefix_cache)
        self.scheduler = Scheduler(limits, blocks)
        self._new_parser = new_parser
        self._trackers: dict[str, Tracker] = {}
        self._num_requests = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_generated_tokens = 0

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads a checkpoint. ConfigError, WeightError or CapacityError before memory is taken."""
        from kvkeye.models.keye.parsing import OutputParser
        from kvkeye.models.keye.processor import KeyeProcessor
        from kvkeye.models.keye.weights import check_folder, load_model

        device = torch.device(config.device) if config.device else default_device()
        dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
        report = check_folder(config.model)
        check_weights_fit(report.num_loaded * dtype.itemsize, device)
        processor = KeyeProcessor.from_folder(config.model)
        model = load_model(config.model, dtype, device)
        logger.info("%s: %s on %s", config.model, dtype, device)
        engine = cls(config, model, processor, OutputParser)
        processor.max_tokens = engine.max_model_len  # refused before media are decoded, not after
        return engine

    # Requests

    def prepare(self, prompt: PromptLike, mode: str | None = None) -> Prepared:
        """Decodes media and tokenises. Slow, and safe to call from any thread."""
        return prepare(self.processor, prompt, mode, self.vocab_size)

    def default_sampling(self) -> SamplingParams:
        """The checkpoint's own generation values."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        defaults = self.processor.generation_defaults
        values = {name: defaults[name] for name in names if defaults.get(name) is not None}
        if defaults.get("do_sample") is False:
            values["temperature"] = 0.0
        return SamplingParams(**values)

    def add(
        self,
        request_id: str,
        prompt: PromptLike,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        salt: str = "",
    ) -> None:
        """Queues a request; RequestError, MediaError or CapacityError with nothing changed if it cannot run.

        Requests with different `salt` share no cached blocks. Lower `priority` runs earlier.
        """
        sampling = sampling or self.default_sampling()
        self._check_entry(request_id, sampling, salt)
        ready = self.prepare(prompt)
        payload, media = Prompt.build(ready.positions, ready.position_delta, ready.media)
        request = Request(
            request_id=request_id,
            prompt=ready.token_ids,
            sampling=sampling,
            max_tokens=self._max_tokens(sampling, len(ready.token_ids)),
            seed=self._seed(sampling),
            priority=priority,
            eos_token_ids=frozenset(self.processor.eos_token_ids),
            media=media,
            salt=salt.encode(),
            payload=payload,
        )
        self.scheduler.add(request)
        self._num_requests += 1

        def decode(ids: list[int]) -> str:
            return self.processor.decode(ids, skip_special_tokens=sampling.skip_special_tokens)

        new_parser = self._new_parser if ready.is_chat else None
        self._trackers[request_id] = Tracker(request, decode, new_parser, ready.prepare_ms)

    def _check_entry(self, request_id: str, sampling: SamplingParams, salt: str) -> None:
        if not isinstance(sampling, SamplingParams):
            raise RequestError(f"sampling: got {type(sampling).__name__}; expected SamplingParams.", param="sampling")
        sampling.check_vocab(self.vocab_size)
        if len(salt.encode()) > MAX_SALT_BYTES:
            raise RequestError(f"salt: {len(salt.encode())} bytes; expected at most {MAX_SALT_BYTES}.", param="salt")
        limit = self.config.max_waiting
        if limit is not None and len(self.scheduler.waiting) >= limit:
            raise CapacityError(
                f"request {request_id!r}: {len(self.scheduler.waiting)} requests are waiting; max_waiting is {limit}. "
                "Try again later."
            )

    def _max_tokens(self, sampling: SamplingParams, num_prompt: int) -> int:
        if sampling.max_tokens is not None:
            return sampling.max_tokens
        return max(1, min(DEFAULT_MAX_TOKENS, self.max_model_len - num_prompt))

    def _seed(self, sampling: SamplingParams) -> int:
        if sampling.seed is not None:
            return sampling.seed
        digest = hashlib.sha256(f"kvkeye.seed {self.config.seed} {self._num_requests}".encode()).digest()
        return int(struct.unpack("<q", digest[:8])[0])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request and frees what it holds; its last output, or None if it has ended already."""
        tracker = self._trackers.get(request_id)
        if tracker is None:
            return None
        for seq in tracker.request.sequences:
            if seq.state is not State.FINISHED:
                tracker.close(seq)
        self.scheduler.abort(request_id)
        return self._settle(tracker)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # Steps

    def step(self) -> list[RequestOutput]:
        """Runs one forward pass; returns a snapshot of each request that gained a token or ended.

        A failure of the pass ends the requests that took part with reason "error"; the engine goes on.
        """
        step = self.scheduler.schedule()
        if not step.rows:
            return []
        self._num_steps += 1
        now = time.perf_counter()
        for row in step.rows:
            self._tracker_of(self.scheduler.sequence(row.seq_id)).note_step(now)
        drawn: dict[tuple[str, int], dict[int, Logprob] | None] = {}
        try:
            result = self._run(step)
            drawn = self._logprobs(step, result)
            changed = self.scheduler.finish(step, result.tokens)
        except Exception as error:
            logger.exception("a step of %d rows failed", len(step.rows))
            changed = self.scheduler.fail(step)
            for seq in changed:
                self._tracker_of(seq).error = f"{type(error).__name__}: {error}"
        if self.config.check_every_step:
            self.scheduler.check()
        return self._report(changed, drawn)

    def _run(self, step: Step) -> StepResult:
        batch = batches.build(step, self.scheduler.sequence, self.config.block_size, self.runner.model.device)
        return self.runner.run(batch)

    def _logprobs(self, step: Step, result: StepResult) -> dict[tuple[str, int], dict[int, Logprob] | None]:
        """By request and answer index: one row's draws become several answers when it forks."""
        found = {}
        for row in step.rows:
            seq = self.scheduler.sequence(row.seq_id)
            for i, logprobs in enumerate(result.logprobs.get(row.seq_id, ())):
                found[seq.request.request_id, seq.index + i] = logprobs
        return found

    def _report(
        self, changed: list[Sequence], drawn: Mapping[tuple[str, int], dict[int, Logprob] | None]
    ) -> list[RequestOutput]:
        touched: dict[str, Tracker] = {}
        for seq in changed:
            tracker = self._tracker_of(seq)
            touched[seq.request.request_id] = tracker
            if tracker.push(seq, drawn.get((seq.request.request_id, seq.index))):
                self.scheduler.end(seq, "stop")
                tracker.close(seq)
            elif seq.finish_reason == "error" and tracker.error is None:
                tracker.error = "The model gave no valid probabilities (NaN or infinite logits)."
        return [self._settle(tracker) for tracker in touched.values()]

    def _tracker_of(self, seq: Sequence) -> Tracker:
        return self._trackers[seq.request.request_id]

    def _settle(self, tracker: Tracker) -> RequestOutput:
        """The snapshot; forgets requests that have ended."""
        output = tracker.output()
        if output.finished:
            del self._trackers[output.request_id]
            tracker.request.payload = None  # pixels must not wait for the collector of cycles
            self._num_prompt_tokens += output.metrics.num_prompt_tokens
            self._num_cached_tokens += output.metrics.num_cached_tokens
            self._num_generated_tokens += output.metrics.num_generated_tokens
        return output

    def stats(self) -> EngineStats:
        """Counters since the start; token counts of requests that have ended."""
        pool, encoder = self.scheduler.blocks.pool, self.runner.encoder_cache
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            encoder_hits=encoder.num_hits,
            encoder_misses=encoder.num_misses,
            encoder_bytes=encoder.num_bytes,
        )
