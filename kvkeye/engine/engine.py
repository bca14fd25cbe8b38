"""One step after the other: plan, compute, tell. Wires scheduler, runner and answers; not thread-safe.

`LLM` and `AsyncEngine` are the two ways to drive it.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from kvkeye.engine.answer import Parser, Tracker
from kvkeye.engine.assemble import build_encodings, build_forward
from kvkeye.engine.backends import serving_backends
from kvkeye.engine.batch import Prompt
from kvkeye.engine.block_manager import BlockManager
from kvkeye.engine.config import EngineConfig, SpeculationConfig
from kvkeye.engine.draft import Drafter
from kvkeye.engine.draft_head import HeadDrafter
from kvkeye.engine.encoder_cache import EncoderCache
from kvkeye.engine.limits import Limits
from kvkeye.engine.machine import available_bytes
from kvkeye.engine.memory import context_length, plan_cache
from kvkeye.engine.outputs import Logprob, OnStage, RequestOutput, SpeculationMetrics
from kvkeye.engine.prepare import Prepared, Processor, PromptLike, prepare
from kvkeye.engine.prepare_queue import PrepareQueue
from kvkeye.engine.request import (
    DEFAULT_MAX_TOKENS,
    MAX_SALT_BYTES,
    Request,
    SamplingParams,
    Sequence,
    State,
)
from kvkeye.engine.runner import Runner
from kvkeye.engine.sampling import StepResult
from kvkeye.engine.scheduler import Scheduler
from kvkeye.engine.speculation import speculation_of
from kvkeye.engine.stats import Counts, EngineStats
from kvkeye.engine.step import Step
from kvkeye.engine.warm_up import warm_up, working_bytes
from kvkeye.errors import CapacityError, RequestError
from kvkeye.models.keye.model import KeyeModel

logger = logging.getLogger("kvkeye.engine")
# By request and answer index: log-probabilities of its new tokens, None where they were not asked for.
DrawnLogprobs = dict[tuple[str, int], list[dict[int, Logprob] | None]]


class TextProcessor(Processor, Protocol):
    """What the engine needs besides prompts: the way back to text, and the checkpoint's habits."""

    @property
    def eos_token_ids(self) -> Any: ...
    @property
    def generation_defaults(self) -> Mapping[str, Any]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...
    def close(self) -> None: ...


class Engine:
    """A model being served: `add` requests, call `step` while `has_work`, read the outputs it returns.

    `drafter` replaces the one that the configuration names.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: KeyeModel,
        processor: TextProcessor,
        new_parser: Callable[[], Parser] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        text = model.config.text
        if drafter is not None and config.speculation == "auto":  # kernels and recordings follow the configuration
            config = replace(config, speculation=SpeculationConfig())
        backends = serving_backends(config, model.device)
        self.speculation = speculation_of(config, drafter, backends)
        head = drafter if isinstance(drafter, HeadDrafter) and self.speculation is not None else None
        working = working_bytes(model, config, context_length(config, text), backends, head)
        block_bytes = 0
        if head is not None and self.speculation is not None:
            working += head.fixed_bytes(config.block_size, config.max_num_seqs, self.speculation.num_tokens)
            block_bytes = head.block_bytes(config.block_size)
        plan = plan_cache(config, text, model.dtype, available_bytes(model.device) - working, block_bytes)
        self.config = config
        self.processor = processor
        self.vocab_size = text.vocab_size
        self.max_model_len = plan.max_model_len
        self.runner = Runner(model, plan.num_blocks, config.block_size, backends, head, plan.dtype)
        if head is not None and self.speculation is not None:
            num_tokens = self.speculation.num_tokens
            head.allocate(plan.num_blocks, config.block_size, config.max_num_seqs, num_tokens, backends)
        warm_up(self.runner, config, plan.max_model_len)
        limits = Limits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=plan.max_model_len,
            max_prefill_chunk=config.max_prefill_chunk,
            max_num_encoder_patches=config.max_num_encoder_patches,
        )
        blocks = BlockManager(plan.num_blocks, config.block_size, config.enable_prefix_cache)
        token_bytes = text.hidden_size * model.dtype.itemsize
        self.scheduler = Scheduler(
            limits, blocks, EncoderCache(config.encoder_cache_memory // token_bytes), self.speculation
        )
        self._new_parser = new_parser
        self._trackers: dict[str, Tracker] = {}
        self._counts = Counts()

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads a checkpoint. ConfigError, WeightError or CapacityError before memory is taken."""
        from kvkeye.engine.loading import load_drafter, load_target
        from kvkeye.models.keye.parsing import OutputParser

        model, processor = load_target(config)
        engine = cls(config, model, processor, OutputParser, load_drafter(config, model))
        processor.max_tokens = engine.max_model_len  # refused before media are decoded, not after
        return engine

    def close(self) -> None:
        """Ends what runs outside this process. The engine cannot read files afterwards."""
        self.processor.close()

    # Requests

    def prepare(self, prompt: PromptLike, mode: str | None = None) -> Prepared:
        """Decodes media and tokenises. Slow, and safe to call from any thread."""
        return prepare(self.processor, prompt, mode, self.vocab_size)

    def prepare_queue(self) -> PrepareQueue:
        """Threads that prepare media, none running yet; to be closed by its user."""
        return PrepareQueue(self.prepare, self.config.num_prepare_threads, self.config.prepared_media_memory)

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
        on_stage: OnStage | None = None,
    ) -> None:
        """Queues a request; RequestError, MediaError or CapacityError with nothing changed if it cannot run.

        Requests with different `salt` share no cached blocks. Lower `priority` runs earlier. `on_stage` hears of the
        stages before the first token.
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
        self._counts.num_requests += 1

        def decode(ids: list[int]) -> str:
            return self.processor.decode(ids, skip_special_tokens=sampling.skip_special_tokens)

        new_parser = self._new_parser if ready.is_chat else None

        def speculation() -> SpeculationMetrics | None:
            return None if self.speculation is None else self.speculation.metrics(request_id)

        self._trackers[request_id] = Tracker(request, decode, new_parser, ready.prepare_ms, on_stage, speculation)

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
        digest = hashlib.sha256(f"kvkeye.seed {self.config.seed} {self._counts.num_requests}".encode()).digest()
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
        self.runner.forget(self.scheduler.encoder.take_dropped())
        return self._settle(tracker)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # Steps

    def step(self) -> list[RequestOutput]:
        """Encodes some media and runs one forward pass; returns snapshots of requests that gained a token or ended.

        A failure of either ends the requests that took part in it with reason "error"; the engine goes on.
        """
        step = self.scheduler.schedule()
        if step.is_empty:
            return []
        self._counts.num_steps += 1
        for seq_id in step.seq_ids:
            self._tracker_of(self.scheduler.sequence(seq_id)).enter("start")
        lost = self._encode(step) if step.encodings else []
        changed, drawn = self._forward(step.without(lost))
        self.runner.forget(self.scheduler.encoder.take_dropped())
        if self.config.check_every_step:
            self.scheduler.check()
        return self._report(lost + changed, drawn)

    def _encode(self, step: Step) -> list[Sequence]:
        """Computes the step's media embeddings; returns the rows that a failure has ended."""
        owners = [self._tracker_of(self.scheduler.sequence(encoding.seq_id)) for encoding in step.encodings]
        for tracker in owners:
            tracker.enter("vision")
        start = time.perf_counter()
        try:
            self.runner.encode(build_encodings(step, self.scheduler.sequence))
        except Exception as error:
            return self._failed("encoding", error, self.scheduler.fail_encodings(step))
        self.scheduler.finish_encodings(step)
        num_patches = sum(encoding.num_patches for encoding in step.encodings)
        elapsed = 1e3 * (time.perf_counter() - start)
        for tracker, encoding in zip(owners, step.encodings):
            tracker.vision_ms += elapsed * encoding.num_patches / num_patches
        self._counts.num_encoder_steps += 1
        self._counts.num_encoded_patches += num_patches
        return []

    def _forward(self, step: Step) -> tuple[list[Sequence], DrawnLogprobs]:
        """Computes the step's rows; returns those that got a token or ended, and log-probabilities."""
        if not step.rows:
            return self.scheduler.finish(step, {}), {}
        for row in step.rows:
            seq = self.scheduler.sequence(row.seq_id)
            if (tracker := self._tracker_of(seq)).stage != "prefill" and self.scheduler.has_embeddings(seq):
                tracker.enter("prefill")
        try:
            start = time.perf_counter()
            result = self._run(step)
            self._observe(step, result, time.perf_counter() - start)
            drawn = self._logprobs(step, result)
            return self.scheduler.finish(step, result.tokens), drawn
        except Exception as error:
            return self._failed("forward pass", error, self.scheduler.fail(step)), {}

    def _failed(self, what: str, error: Exception, ended: list[Sequence]) -> list[Sequence]:
        logger.error("a step's %s failed and ended %d answers", what, len(ended), exc_info=error)
        for seq in ended:
            self._tracker_of(seq).error = f"{type(error).__name__}: {error}"
        return ended

    def _run(self, step: Step) -> StepResult:
        return self.runner.run(build_forward(step, self.scheduler.sequence, self.config.block_size))

    def _observe(self, step: Step, result: StepResult, seconds: float) -> None:
        if self.speculation is not None:
            rows = {row.seq_id: self.scheduler.sequence(row.seq_id) for row in step.rows}
            num_drawn = {seq_id: len(tokens) for seq_id, tokens in result.tokens.items()}
            self.speculation.observe(step, rows, num_drawn, seconds)

    def _logprobs(self, step: Step, result: StepResult) -> DrawnLogprobs:
        """By request and answer index: one row's draws become several answers when it forks."""
        found: DrawnLogprobs = {}
        for row in step.rows:
            seq = self.scheduler.sequence(row.seq_id)
            drawn = result.logprobs.get(row.seq_id, [])
            if row.parents:
                found[seq.request.request_id, seq.index] = drawn
                continue
            for i, logprobs in enumerate(drawn):
                found[seq.request.request_id, seq.index + i] = [logprobs]
        return found

    def _report(self, changed: list[Sequence], drawn: DrawnLogprobs) -> list[RequestOutput]:
        touched: dict[str, Tracker] = {}
        for seq in changed:
            tracker = self._tracker_of(seq)
            touched[seq.request.request_id] = tracker
            if tracker.push(seq, drawn.get((seq.request.request_id, seq.index), [])):
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
            if self.speculation is not None:
                self.speculation.forget_request(output.request_id)
            tracker.request.payload = None  # pixels must not wait for the collector of cycles
            self._counts.add(output.metrics)
        return output

    def stats(self) -> EngineStats:
        pool, encoder, counts = self.scheduler.blocks.pool, self.scheduler.encoder, self._counts
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_steps=counts.num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_cached_tokens=counts.num_cached_tokens,
            num_generated_tokens=counts.num_generated_tokens,
            num_blocks=pool.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            num_encoder_steps=counts.num_encoder_steps,
            num_encoded_patches=counts.num_encoded_patches,
            encoder_hits=encoder.num_hits,
            encoder_misses=encoder.num_misses,
            encoder_bytes=self.runner.num_media_bytes,
            speculation=None if self.speculation is None else self.speculation.total.metrics(),
        )
