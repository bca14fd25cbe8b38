"""What a caller gets back. Plain data; names are vLLM's where vLLM has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# A request's first step begins; its first media are being encoded; the rest of its prompt follows, all media are ready.
Stage = Literal["start", "vision", "prefill"]
STAGES: tuple[Stage, ...] = ("start", "vision", "prefill")
# Called in the middle of a step, by the thread that runs it. What it raises is logged and otherwise ignored.
OnStage = Callable[[Stage], None]


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability before penalties and temperature; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer so far. `text` never takes back a character.

    reasoning      what the model wrote inside its thinking tags; "" for `generate`
    finish_reason  None while running; "stop", "length", "abort" or "error"
    stop_reason    the stop string or stop token that ended it
    logprobs       per token, the chosen and the likeliest ids; None unless asked for
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    reasoning: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class SpeculationMetrics:
    """What proposals were worth, over decoding steps and passes of prompts that checked proposals.

    acceptance_by_position  share of the drafts that got there whose next proposal was drawn
    tokens_per_step         tokens of one answer per step, 1 without speculation
    saved_ms                estimate: steps of one token, by the engine's own step times, less the decoding steps
    """

    num_decode_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    acceptance_by_position: list[float] = field(default_factory=list)
    tokens_per_step: float | None = None
    saved_ms: float = 0.0


@dataclass(frozen=True)
class RequestMetrics:
    """Times in milliseconds from the request's arrival at the engine; None until known.

    prepare_ms    decoding and resizing of media, tokenising (before arrival)
    queue_ms      waiting for the first step
    vision_ms     encoding of media, by patches where a pass served several requests; what others had encoded is free
    prefill_ms    first step to first token, encoding included
    decode_ms     first token to last
    ttft_ms       arrival to first token
    tokens_per_s  within decode_ms, of the tokens that did not come with the first; None where there are none
    speculation   what proposals were worth, known at the end; None without speculative decoding
    """

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    prepare_ms: float = 0.0
    vision_ms: float = 0.0
    queue_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    ttft_ms: float | None = None
    tokens_per_s: float | None = None
    speculation: SpeculationMetrics | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A snapshot of a request; `error` says why answers ended with "error"."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    finished: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """What one answer gained since the last delta of the same index."""

    index: int
    text: str
    reasoning: str
    token_ids: list[int]
    finish_reason: str | None
    output: RequestOutput


def deltas(before: RequestOutput | None, now: RequestOutput) -> list[Delta]:
    """What each answer gained between two snapshots; answers without news are left out."""
    known = {} if before is None else {answer.index: answer for answer in before.outputs}
    changes = []
    for answer in now.outputs:
        old = known.get(answer.index, CompletionOutput(answer.index))
        delta = Delta(
            index=answer.index,
            text=answer.text[len(old.text) :],
            reasoning=answer.reasoning[len(old.reasoning) :],
            token_ids=answer.token_ids[len(old.token_ids) :],
            finish_reason=answer.finish_reason,
            output=now,
        )
        if delta.token_ids or delta.text or delta.reasoning or answer.finish_reason != old.finish_reason:
            changes.append(delta)
    return changes
