"""Training state that resumes to the same bits, and the export of a finished model in the Hub's file layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.weights import save_model
from kvkeye.train.data import MAX_PIXELS, MIN_PIXELS
from kvkeye.train.tokenizer import build_tokenizer, tokenizer_config

STATE = "state.pt"
# Clips read from files: frames as small and clips as short as those of training.
CLIPS = {"min_pixels": MIN_PIXELS, "max_pixels": 25088, "max_frames": 8}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the state in one step: a killed run leaves either the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE}.partial"
    torch.save(state, partial)
    os.replace(partial, folder / STATE)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an interrupted run, or None. Only tensors and plain values are unpickled."""
    path = folder / STATE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    if "step" not in state:
        raise ConfigError(f"{path}: no training state inside; delete the file or choose another output folder")
    return state


def model_config(sizes: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a checkpoint with these sizes and the bundled tokenizer's ids."""
    tokenizer = build_tokenizer()

    def token(text: str) -> int:
        found = tokenizer.token_to_id(text)
        assert found is not None, f"{text} belongs to the bundled tokenizer"
        return int(found)

    sizes = dict(sizes)
    vision = {
        "model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "tokens_per_second": 2, "num_channels": 3, "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6, **sizes.pop("vision"),
    }  # fmt: skip
    return {
        "architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye",
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64, "max_position_embeddings": 4096,
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "torch_dtype": "bfloat16",
        "bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
        "vision_token_id": token("<|vision_pad|>"), "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"), **sizes, "vision_config": vision,
    }  # fmt: skip


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif item['type'] == 'video' or 'video' in item %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def preprocessor_config() -> dict[str, Any]:
    """The `preprocessor_config.json`: the family's, with a lower limit for small pictures and for frames of clips."""
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "max_pixels": MAX_PIXELS,
        "merge_size": 2, "min_pixels": MIN_PIXELS, "patch_size": 14, "processor_class": "KeyeProcessor",
        "resample": 3, "rescale_factor": 1 / 255, "temporal_patch_size": 1, "kvkeye_video": CLIPS,
    }  # fmt: skip


def export(model: KeyeModel, weights: dict[str, Tensor], sizes: dict[str, Any], folder: Path) -> None:
    """Writes a checkpoint folder that `LLM(folder)` loads: `weights` (by parameter name) in bf16, JSON, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(sizes)
    finished = KeyeModel(KeyeConfig.from_dict(config))
    finished.load_state_dict(weights)
    save_model(finished, folder, torch.bfloat16)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = [config["eos_token_id"], config["bos_token_id"]]
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": config["pad_token_id"],
        "temperature": 0.0,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", preprocessor_config()),
        ("chat_template.json", {"chat_template": CHAT_TEMPLATE}),
        ("tokenizer_config.json", tokenizer_config(tokenizer)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
