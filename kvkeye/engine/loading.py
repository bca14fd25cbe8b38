"""From a configuration to what an engine is made of: the model, its processor, the drafter."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from kvkeye.engine.backends import serving_backends
from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.config import EngineConfig, SpeculationConfig
from kvkeye.engine.draft import Drafter
from kvkeye.engine.draft_head import HeadDrafter
from kvkeye.engine.draft_model import DraftModel
from kvkeye.engine.machine import default_device, default_dtype
from kvkeye.engine.memory import DEFAULT_MAX_MODEL_LEN, check_weights_fit
from kvkeye.errors import ConfigError
from kvkeye.layers import pack_weights, quantize_weights
from kvkeye.models.draft.weights import load_head, target_hash
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.processor import KeyeProcessor
from kvkeye.models.keye.weights import check_folder, load_model
from kvkeye.utils.assets import folder_of

logger = logging.getLogger("kvkeye.engine")


def load_target(config: EngineConfig) -> tuple[KeyeModel, KeyeProcessor]:
    """The checkpoint that `config.model` names. ConfigError, WeightError or CapacityError before memory is taken."""
    device = torch.device(config.device) if config.device else default_device()
    dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
    if config.quantization is not None and device.type != "cpu":
        raise ConfigError(
            f"EngineConfig.quantization: {config.quantization} weights run on the CPU; the device is {device}. "
            "Leave it out, or choose device='cpu'."
        )
    if config.kv_cache_dtype == "fp8":
        serving_backends(config, device)  # refused before weights are read
    report = check_folder(config.model)
    check_weights_fit(report.num_loaded * dtype.itemsize, device)
    processor = KeyeProcessor.from_folder(config.model, media_workers=config.media_workers)
    if dtype == torch.bfloat16:
        processor.pixel_dtype = dtype
    model = load_model(config.model, dtype, device)
    if config.quantization == "int8":
        quantize_weights(model.language)
    pack_weights(model)
    logger.info("%s: %s on %s", config.model, dtype, device)
    return model, processor


def load_drafter(config: EngineConfig, target: KeyeModel) -> Drafter | None:
    """What `config.speculation` names, in the target's dtype and place; None where it names none.

    Raises ConfigError or WeightError if it cannot be read or is not made for this target
    """
    wanted = config.speculation
    if not isinstance(wanted, SpeculationConfig) or wanted.model is None:
        return None
    folder = folder_of(wanted.model)
    if wanted.method == "eagle3":
        return _head(folder, wanted.tree_width, config, target)
    return _draft_model(folder, config, target)


def _head(folder: Path, width: int, config: EngineConfig, target: KeyeModel) -> HeadDrafter:
    head = load_head(folder, target.dtype, target.device)
    head.config.check_target(target.config.text, str(folder))
    if head.config.target_hash != target_hash(config.model):
        raise ConfigError(
            f"SpeculationConfig.model: the head {folder} was trained for another checkpoint than {config.model}. "
            "Train one for it with `kvkeye train draft.toml target=FOLDER`."
        )
    pack_weights(head)
    return HeadDrafter(head, target, width)


def _draft_model(folder: Path, config: EngineConfig, target: KeyeModel) -> DraftModel:
    check_folder(folder)
    ours, theirs = (Path(path, "tokenizer.json").read_bytes() for path in (config.model, folder))
    if ours != theirs:
        raise ConfigError(
            f"SpeculationConfig.model: the tokenizer of {folder} is not that of {config.model}. Choose a model of the "
            "same family."
        )
    model = load_model(folder, target.dtype, target.device)
    pack_weights(model)
    text = target.config.text
    max_model_len = config.max_model_len or min(text.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    num_blocks = config.num_blocks or config.max_num_seqs * ceil_div(max_model_len, config.block_size)
    return DraftModel(model, num_blocks, config.block_size, serving_backends(config, target.device))
