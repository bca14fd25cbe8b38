"""What an engine does on a GPU before its first request: measures what its passes take, then records them."""

from __future__ import annotations

import gc
import logging
import time

import torch

from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.config import EngineConfig, SpeculationConfig
from kvkeye.engine.decode_graphs import token_sizes
from kvkeye.engine.encoder_graphs import patch_sizes
from kvkeye.engine.graphs import CudaRecorder, Recorder
from kvkeye.engine.machine import available_bytes, gib
from kvkeye.engine.memory import cache_dtype
from kvkeye.engine.runner import FeatureObserver, Runner
from kvkeye.models.keye.model import KeyeModel

logger = logging.getLogger("kvkeye.engine")


def record_passes(runner: Runner, config: EngineConfig, max_model_len: int, record: Recorder) -> None:
    """Records every size of step and encoder pass that this engine meets, the largest first."""
    start = time.perf_counter()
    speculation = config.speculation if isinstance(config.speculation, SpeculationConfig) else None
    per_row = 1 if speculation is None else 1 + speculation.num_speculative_tokens
    trees = speculation is not None and speculation.tree_width > 1
    width = ceil_div(max_model_len, config.block_size)
    runner.record(token_sizes(config.max_num_seqs * per_row), width, record, trees)
    runner.record_encoder(patch_sizes(config.max_num_encoder_patches), record)
    logger.info("passes recorded in %.1f s", time.perf_counter() - start)


def warm_up(runner: Runner, config: EngineConfig, max_model_len: int) -> None:
    """Records the passes of an engine on a GPU. On a CPU, and where graphs are not wanted, there is nothing to do."""
    if runner.model.device.type == "cuda" and not config.enforce_eager:
        record_passes(runner, config, max_model_len, CudaRecorder(runner.model.device))


def working_bytes(
    model: KeyeModel,
    config: EngineConfig,
    max_model_len: int,
    backends: str,
    observer: FeatureObserver | None = None,
) -> int:
    """What the largest passes and all recordings take beside weights, KV cache and embeddings: 0 on a CPU.

    Measured by running them with a cache of one block. UnsupportedError if a kernel refuses this model.
    """
    if model.device.type != "cuda":
        return 0
    before = available_bytes(model.device)
    trial = Runner(model, 1, config.block_size, backends, observer, cache_dtype(config, model.dtype))
    trial.rehearse(config.max_num_batched_tokens, config.max_num_seqs, config.max_num_encoder_patches)
    warm_up(trial, config, max_model_len)
    torch.cuda.synchronize(model.device)
    taken = before - available_bytes(model.device)  # with what PyTorch's allocator holds back for the next pass
    del trial
    gc.collect()
    torch.cuda.empty_cache()
    logger.info("passes and recordings take %s", gib(taken))
    return max(0, taken)
