"""What a caller asks for and what one answer row looks like while it runs.

Knows limits of sampling values and the life of a row: WAITING -> RUNNING -> FINISHED, back to WAITING when preempted.
Must not know tensors, models or tokenizers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvkeye.errors import RequestError

MAX_N = 8
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_SALT_BYTES = 1024
DEFAULT_MAX_TOKENS = 4096
# Below this a temperature means greedy: the division would only overflow.
GREEDY_TEMPERATURE = 1e-5
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def _refuse(param: str, given: object, required: str, advice: str) -> RequestError:
    return RequestError(f"SamplingParams.{param}: got {given!r}; expected {required}. {advice}", param=param)


def _check_float(param: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """Finite first, then range: a NaN passes every comparison that is written the other way round."""
    required = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(param, value, required, f"Its type is {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise _refuse(param, value, required, "Send a finite number.")
    if value > high or value < low or (open_low and value == low):
        raise _refuse(param, value, required, "Choose a value inside the range.")
    return float(value)


def _check_int(param: str, value: object, low: int, high: int) -> int:
    required = f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(param, value, required, f"Its type is {type(value).__name__}.")
    if not low <= value <= high:
        raise _refuse(param, value, required, "Choose a value inside the range.")
    return value


def _check_stop_strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise _refuse("stop", value, "a string or a list of strings", "Token ids belong in stop_token_ids.")
    if len(value) > MAX_STOP_STRINGS:
        raise _refuse("stop", f"{len(value)} strings", f"at most {MAX_STOP_STRINGS}", "Send fewer.")
    for text in value:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise _refuse(
                "stop", f"a string of {len(text)} characters", f"1 to {MAX_STOP_CHARS} each", "Change its length."
            )
    return tuple(value)


def _check_stop_tokens(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise _refuse("stop_token_ids", value, "a list of token ids", "Strings belong in stop.")
    if len(value) > MAX_STOP_TOKENS:
        raise _refuse("stop_token_ids", f"{len(value)} ids", f"at most {MAX_STOP_TOKENS}", "Send fewer.")
    return tuple(_check_int("stop_token_ids", token, 0, 2**31 - 1) for token in value)


def _check_flag(param: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(param, value, "True or False", f"Its type is {type(value).__name__}.")
    return value


@dataclass(frozen=True)
class SamplingParams:
    """How tokens of one request are chosen and when it ends. Names and meanings are vLLM's.

    temperature 0 is greedy; top_k 0 or -1 and top_p 1 are off. `max_tokens=None` means 4096, or what the context
    leaves if that is less. `seed=None` draws one from the engine's own seed. `logprobs=k` reports the chosen token and
    the k most likely ones. Every value is checked here and, where the model's sizes matter, again by the engine.
    Raises RequestError naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("n", _check_int("n", self.n, 1, MAX_N))
        put("temperature", _check_float("temperature", self.temperature, 0.0, 2.0))
        put("top_p", _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True))
        put("top_k", max(0, _check_int("top_k", self.top_k, -1, 2**31 - 1)))
        put("min_p", _check_float("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", _check_float("repetition_penalty", self.repetition_penalty, 0.0, 2.0, open_low=True))
        put("presence_penalty", _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        if self.max_tokens is not None:
            put("max_tokens", _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1))
        if self.seed is not None:
            put("seed", _check_int("seed", self.seed, INT64_MIN, INT64_MAX))
        if self.logprobs is not None:
            put("logprobs", _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        put("stop", _check_stop_strings(self.stop))
        put("stop_token_ids", _check_stop_tokens(self.stop_token_ids))
        put("ignore_eos", _check_flag("ignore_eos", self.ignore_eos))
        put("skip_special_tokens", _check_flag("skip_special_tokens", self.skip_special_tokens))
        if self.n > 1 and self.is_greedy:
            raise _refuse("n", self.n, "1 with temperature 0", "All answers would be the same; raise the temperature.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocab(self, vocab_size: int) -> None:
        """Refuses ids that the model does not have; they would index past the logits."""
        for token in self.stop_token_ids:
            if token >= vocab_size:
                raise _refuse("stop_token_ids", token, f"ids in [0, {vocab_size})", "Use this model's own tokenizer.")


@dataclass(frozen=True)
class MediaSpan:
    """`length` prompt tokens from `start` that stand for the content named by `key`.

    key          content together with the positions of its tokens: names KV blocks
    embeds       content alone: names embeddings, shared by every request that shows it
    num_patches  what computing the embeddings costs; they come in one piece. 0: there is nothing to compute
    """

    start: int
    length: int
    key: bytes
    embeds: bytes = b""
    num_patches: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_NEXT = {
    State.WAITING: (State.RUNNING, State.FINISHED),
    State.RUNNING: (State.WAITING, State.FINISHED),
    State.FINISHED: (),
}


@dataclass(eq=False)
class Request:
    """One prompt with its sampling values. The scheduler never looks into `payload`."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    max_tokens: int
    seed: int = 0
    priority: int = 0
    arrival: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    media: tuple[MediaSpan, ...] = ()
    salt: bytes = b""
    payload: Any = None
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_spans(self.media, len(self.prompt))

    @property
    def is_finished(self) -> bool:
        return all(seq.state is State.FINISHED for seq in self.sequences)

    def media_between(self, start: int, end: int) -> Iterable[MediaSpan]:
        """Spans that overlap positions [start, end), in order."""
        for _, span in self.media_from(start):
            if span.start >= end:
                return
            yield span

    def media_from(self, start: int) -> Iterable[tuple[int, MediaSpan]]:
        """(index, span) of the spans that end after `start`, in order."""
        first = bisect_right(self.media, start, key=lambda span: span.end)
        return enumerate(self.media[first:], first)


def check_spans(media: tuple[MediaSpan, ...], prompt_length: int) -> None:
    """Refuses spans that are empty, out of order, overlapping or outside the prompt."""
    previous_end = 0
    for span in media:
        if span.length < 1 or span.start < previous_end or span.end > prompt_length:
            raise RequestError(
                f"media span [{span.start}, {span.end}): expected spans in order, not overlapping, inside the "
                f"prompt's {prompt_length} tokens. The processor and the prompt disagree; build both together.",
                param="media",
            )
        previous_end = span.end


@dataclass(eq=False)
class Sequence:
    """One answer of a request: its tokens, where their keys and values lie, and how far they are computed.

    `tokens` is prompt plus answer. The keys and values of the first `num_computed` lie in the blocks of `block_table`.
    `width` answers will start from this row's prompt: n until the prompt is computed and forked, then 1.
    `embeds` names the media embeddings that are kept for the tokens still to be computed.
    """

    seq_id: int
    request: Request
    index: int
    tokens: list[int]
    width: int = 1
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    state: State = State.WAITING
    finish_reason: str | None = None
    num_cached: int = 0
    num_preemptions: int = 0
    embeds: set[bytes] = field(default_factory=set)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 in plain decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def max_draft_depth(self) -> int:
        """Proposals that can be accepted before the answer is full."""
        return self.request.max_tokens - self.num_generated - 1

    @property
    def rank(self) -> tuple[int, int, int]:
        """Lower runs earlier and is preempted later."""
        return (self.request.priority, self.request.arrival, self.seq_id)

    def move_to(self, state: State) -> None:
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"sequence {self.seq_id}: cannot go from {self.state.value} to {state.value}")
        self.state = state
