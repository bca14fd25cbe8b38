"""How much a step and a request may hold. Plain numbers; no tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvkeye.engine.block_manager import BlockManager, ceil_div
from kvkeye.engine.request import Request
from kvkeye.errors import CapacityError, RequestError


@dataclass(frozen=True)
class Limits:
    """max_num_seqs rows and max_num_batched_tokens tokens a step; at most max_prefill_chunk tokens of one row.

    A step encodes max_num_encoder_patches patches of media, or one picture or clip that is larger.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int = 8192
    max_prefill_chunk: int | None = None
    max_num_encoder_patches: int = 4096


def check_request(request: Request, limits: Limits, blocks: BlockManager, running: Collection[str]) -> None:
    """RequestError or CapacityError if it could never run; `running` are the ids that are taken."""
    num_prompt, longest = len(request.prompt), len(request.prompt) + request.max_tokens
    where = f"request {request.request_id!r}"
    if request.request_id in running:
        raise RequestError(f"{where}: this id is already running. Choose another.", param="request_id")
    if num_prompt == 0:
        raise RequestError(f"{where}: the prompt is empty; expected at least one token. Send text.", param="prompt")
    if longest > limits.max_model_len:
        raise RequestError(
            f"{where}: {num_prompt} prompt tokens + {request.max_tokens} new tokens = {longest}; the context holds "
            f"{limits.max_model_len}. Shorten the prompt, shrink the media or lower max_tokens.",
            param="max_tokens" if num_prompt < limits.max_model_len else "prompt",
        )
    if request.sampling.n > limits.max_num_seqs:
        raise RequestError(
            f"{where}: n={request.sampling.n} rows; max_num_seqs is {limits.max_num_seqs}. Lower n.", param="n"
        )
    num_blocks = ceil_div(longest, blocks.block_size)
    if num_blocks > blocks.pool.num_blocks:
        raise CapacityError(
            f"{where}: {longest} tokens need {num_blocks} KV blocks of {blocks.block_size}; there are "
            f"{blocks.pool.num_blocks}. Lower max_tokens or give the KV cache more memory."
        )
