"""Tiny Keye-VL checkpoints with random weights, in the Hub's file layout: what tests and benchmarks load.

Head sizes are the real ones (72 in the tower, 128 in the decoder), everything else is small. The tokenizer spells
text byte by byte and knows the family's special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kvkeye.models.keye.config import KeyeConfig, TextConfig, Version, VisionConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.weights import save_model

NUM_BYTES = 256
# In the order of the family's ids; True where its tokenizer flags the token as special.
_SPECIAL = (
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end")),
    *((f"<|{name}_{end}|>", False) for name in ("object_ref", "box", "quad") for end in ("start", "end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    *((name, False) for name in ("<tool_call>", "</tool_call>")),
    *(
        (f"<|{name}|>", False)
        for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
    ),
    *((name, False) for name in ("<tool_response>", "</tool_response>", "<think>", "</think>")),
    *((f"<|{name}_{end}|>", False) for name in ("point", "ocr_text", "clip_time") for end in ("start", "end")),
    *((f"<|{name}|>", True) for name in ("frame", "fast_start", "fast_end")),
)
TOKEN_IDS = {text: NUM_BYTES + i for i, (text, _) in enumerate(_SPECIAL)}
VOCAB_SIZE = 320  # 256 bytes, 35 special tokens, padded to a multiple of 64

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' or 'image' in item or 'image_url' in item -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif item['type'] == 'video' or 'video' in item -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in item -%}{{- item['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def tiny_keye_config(
    version: Version = "preview", num_layers: int = 2, tie_word_embeddings: bool = False
) -> KeyeConfig:
    """A configuration of 1.3 million parameters (two layers)."""
    vision = VisionConfig(
        hidden_size=144,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=98,
        patch_size=14,
        spatial_merge_size=2,
        tokens_per_second=2.0,
    )
    text = TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6 if version == "preview" else 8e6,
        mrope_section=(16, 24, 24),
        max_position_embeddings=8192,
        tie_word_embeddings=tie_word_embeddings,
    )
    return KeyeConfig(
        version=version,
        vision=vision,
        text=text,
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
        eos_token_ids=(TOKEN_IDS["<|im_end|>"],),
        bos_token_id=TOKEN_IDS["<|endoftext|>"],
        torch_dtype="float32",
    )


def tiny_keye_model(version: Version = "preview", seed: int = 0, dtype: torch.dtype = torch.float32) -> KeyeModel:
    """A model with random weights, norms and biases included, so that no term of the computation vanishes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KeyeModel(tiny_keye_config(version))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def write_tiny_checkpoint(folder: str | Path, version: Version = "preview", seed: int = 0) -> Path:
    """Writes a complete folder: configuration, weights, tokenizer, template, processor and generation defaults."""
    folder = Path(folder)
    model = tiny_keye_model(version, seed)
    save_model(model, folder)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor",
            "processor_class": "KeyeProcessor", "merge_size": 2, "min_pixels": 3136, "max_pixels": 1003520,
            "patch_size": 14, "resample": 3, "rescale_factor": 1 / 255, "temporal_patch_size": 1,
        },
    )  # fmt: skip
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": TOKEN_IDS["<|endoftext|>"], "pad_token_id": TOKEN_IDS["<|endoftext|>"], "do_sample": True,
            "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
            "temperature": 0.6, "top_p": 0.95, "top_k": 20,
        },
    )  # fmt: skip
    return folder


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, then the special tokens."""
    glyphs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={glyph: i for i, glyph in enumerate(glyphs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in _SPECIAL])
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    added = {
        str(TOKEN_IDS[text]): {
            "content": text, "special": special, "normalized": False, "lstrip": False, "rstrip": False,
            "single_word": False,
        }
        for text, special in _SPECIAL
    }  # fmt: skip
    return {
        "added_tokens_decoder": added,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
