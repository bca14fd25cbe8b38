"""A checkpoint folder without weights: all JSON files that the processor reads, small but in the Hub's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

FLAGGED = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
PLAIN = ["<think>", "</think>", "<|box_start|>", "<|box_end|>", "<|frame|>", "<|fast_start|>", "<|fast_end|>"]
IDS = {text: 256 + i for i, text in enumerate(FLAGGED + PLAIN)}

# Written from the published behaviour: no default system turn, items in order, nothing between them.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}
{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif item.type == 'video' or 'video' in item -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in item -%}
{{ item.text }}
{%- endif -%}
{% endfor %}{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
)


def tokenizer() -> Tokenizer:
    """One token per byte, and the family's special tokens with the family's flags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={glyph: i for i, glyph in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special=text in FLAGGED, normalized=False) for text in FLAGGED + PLAIN])
    return made


def config(version: str = "preview") -> dict[str, Any]:
    names = {
        "preview": ("KeyeForConditionalGeneration", "Keye"),
        "1.5": ("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
    }
    return {
        "architectures": [names[version][0]], "model_type": names[version][1],
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 320,
        "max_position_embeddings": 8192, "hidden_act": "silu", "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "eos_token_id": IDS["<|im_end|>"], "bos_token_id": IDS["<|endoftext|>"],
        "image_token_id": IDS["<|image_pad|>"], "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"], "vision_end_token_id": IDS["<|vision_end|>"],
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 384, "patch_size": 14, "spatial_merge_size": 2, "tokens_per_second": 2,
        },
    }  # fmt: skip


def preprocessor() -> dict[str, Any]:
    return {
        "min_pixels": 3136, "max_pixels": 1003520, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 1,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip


def write_folder(path: Path, version: str = "preview", **files: Any) -> Path:
    """Writes the folder; `files` replaces or, with None, leaves out JSON files by their stem."""
    contents: dict[str, Any] = {
        "config": config(version),
        "preprocessor_config": preprocessor(),
        "generation_config": {
            "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
            "eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]],
        },
        "chat_template": {"chat_template": TEMPLATE},
        "tokenizer_config": {"eos_token": "<|im_end|>", "chat_template": "text only: {{ messages[0].content }}"},
    } | files  # fmt: skip
    path.mkdir(parents=True, exist_ok=True)
    for stem, data in contents.items():
        if data is not None:
            (path / f"{stem}.json").write_text(json.dumps(data))
    tokenizer().save(str(path / "tokenizer.json"))
    return path
