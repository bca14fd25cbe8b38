"""Whatever a caller may send as a prompt, as tokens, positions and media. Slow work: runs outside the engine's loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvkeye.engine.batch import Media
from kvkeye.errors import RequestError

Message = dict[str, Any]
PromptLike = Any  # str | list[int] | list[Message] | ProcessedPrompt | Prepared


class Processed(Protocol):
    """What a processor returns; see kvkeye.models.keye.processor.ProcessedPrompt."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def media(self) -> Sequence[Media]: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def position_delta(self) -> int: ...


class Processor(Protocol):
    def process(self, messages: list[Message], mode: str | None = None) -> Processed: ...
    def process_text(self, text: str) -> Processed: ...


@dataclass(frozen=True)
class Prepared:
    """A prompt ready to run. `is_chat` answers are split into reasoning and text."""

    token_ids: list[int]
    positions: Tensor
    position_delta: int = 0
    media: list[Media] = field(default_factory=list)
    is_chat: bool = False
    prepare_ms: float = 0.0

    @property
    def num_media_bytes(self) -> int:
        return sum(media.pixel_values.nbytes for media in self.media)


def is_conversation(prompt: object) -> bool:
    """A non-empty list of messages, as opposed to token ids or a list of conversations."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def has_media(prompt: PromptLike) -> bool:
    """Whether preparing it may be slow: messages of several parts, as opposed to plain text or what is prepared."""
    return is_conversation(prompt) and any(not isinstance(message.get("content"), str) for message in prompt)


def prepare(processor: Processor, prompt: PromptLike, mode: str | None, vocab_size: int) -> Prepared:
    """Text, token ids, messages or a processed prompt -> Prepared. RequestError or MediaError for anything unusable."""
    if isinstance(prompt, Prepared):
        return prompt
    start = time.perf_counter()
    is_chat = is_conversation(prompt)
    if is_chat:
        processed = processor.process(prompt, mode=mode)
    elif isinstance(prompt, str):
        processed = processor.process_text(prompt)
    elif isinstance(prompt, list):
        ids = check_token_ids(prompt, vocab_size)
        return Prepared(ids, torch.arange(len(ids)).expand(3, -1))
    elif hasattr(prompt, "token_ids") and hasattr(prompt, "positions"):
        processed, is_chat = prompt, True
    else:
        raise RequestError(
            f"prompt: got {type(prompt).__name__}; expected text, a list of token ids, or a list of messages.",
            param="prompt",
        )
    return Prepared(
        token_ids=list(processed.token_ids),
        positions=processed.positions,
        position_delta=processed.position_delta,
        media=list(processed.media),
        is_chat=is_chat,
        prepare_ms=1e3 * (time.perf_counter() - start),
    )


def check_token_ids(ids: list[Any], vocab_size: int) -> list[int]:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt: got token id {token!r}; expected integers in [0, {vocab_size}). "
                "Use this model's own tokenizer.",
                param="prompt",
            )
    return list(ids)
