"""How much memory an engine will take, added up before any of it is allocated."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.config import EngineConfig
from kvkeye.engine.machine import available_bytes, gib
from kvkeye.errors import CapacityError, ConfigError
from kvkeye.models.keye.config import TextConfig

logger = logging.getLogger("kvkeye.engine")
DEFAULT_MAX_MODEL_LEN = 32768
KV_SHARE = 0.4  # of the free memory, when nothing is said


@dataclass(frozen=True)
class CachePlan:
    max_model_len: int
    num_blocks: int
    block_bytes: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What the KV caches hold beside a model of `dtype`."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype


def block_bytes(text: TextConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers: keys, values, and of float8_e4m3fn a scale for each head and token."""
    scale = torch.float32.itemsize if dtype == torch.float8_e4m3fn else 0
    rows = 2 * text.num_hidden_layers * text.num_key_value_heads * block_size
    return rows * (text.head_dim * dtype.itemsize + scale)


def check_weights_fit(num_bytes: int, device: torch.device) -> None:
    """CapacityError before loading if the weights alone do not fit."""
    free = available_bytes(device)
    if num_bytes > free:
        raise CapacityError(
            f"engine: the weights need {gib(num_bytes)}; {gib(free)} are free on {device}. "
            "Use a smaller dtype, free memory, or choose a smaller model."
        )


def context_length(config: EngineConfig, text: TextConfig) -> int:
    """Longest prompt plus answer, in tokens. ConfigError if it is more than the checkpoint has positions for."""
    max_model_len = config.max_model_len or min(text.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > text.max_position_embeddings:
        raise ConfigError(
            f"EngineConfig.max_model_len: got {max_model_len}; the checkpoint's positions end at "
            f"{text.max_position_embeddings}. Lower max_model_len."
        )
    return max_model_len


def plan_cache(
    config: EngineConfig, text: TextConfig, dtype: torch.dtype, free_bytes: int, head_bytes: int = 0
) -> CachePlan:
    """Blocks and context for the memory that is left after the weights and what passes take.

    head_bytes: of a draft head, per block.

    Raises CapacityError with the sum if one full context, or what was asked for, does not fit.
    """
    max_model_len = context_length(config, text)
    held = cache_dtype(config, dtype)
    size = block_bytes(text, config.block_size, held) + head_bytes
    per_sequence = ceil_div(max_model_len, config.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // size
    else:
        num_blocks = min(config.max_num_seqs * per_sequence, int(free_bytes * KV_SHARE) // size)
    plan = CachePlan(max_model_len, num_blocks, size, held)
    _check(plan, per_sequence, config, free_bytes)
    logger.info("KV cache: %d blocks of %d tokens, %s", num_blocks, config.block_size, gib(plan.num_bytes))
    return plan


def _check(plan: CachePlan, per_sequence: int, config: EngineConfig, free_bytes: int) -> None:
    if plan.num_blocks < per_sequence:
        raise CapacityError(
            f"engine: the KV cache holds {plan.num_blocks} blocks of {config.block_size} tokens "
            f"({gib(plan.num_bytes)}); one context of {plan.max_model_len} tokens needs {per_sequence} "
            f"({gib(per_sequence * plan.block_bytes)}). Lower max_model_len or raise kv_cache_memory or num_blocks."
        )
    needed = plan.num_bytes + config.encoder_cache_memory
    if needed > free_bytes:
        raise CapacityError(
            f"engine: KV cache {gib(plan.num_bytes)} + media embeddings {gib(config.encoder_cache_memory)} = "
            f"{gib(needed)}; {gib(free_bytes)} are free. Lower num_blocks, kv_cache_memory or encoder_cache_memory."
        )
