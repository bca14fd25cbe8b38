"""Random checkpoints of real geometry, written once: a Keye-VL folder for us, a Qwen3 folder of the same weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvkeye.models.keye.config import KeyeConfig, TextConfig
from kvkeye.models.keye.weights import Place, places
from kvkeye.testing.tiny import tiny_keye_config, write_tiny_checkpoint

POOL = 2**24 - 3  # odd, so that no two rows of a matrix are equal
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Geometry:
    name: str
    text: TextConfig

    def weight_bytes(self) -> int:
        """Read for one step in bf16: every layer and the output matrix, but no row of an embedding of its own."""
        found = {n: p for n, p in places(self.config()).items() if is_text(n)}
        if not self.text.tie_word_embeddings:
            del found["model.embed_tokens.weight"]
        return 2 * sum(prod(place.shape) for place in found.values())

    def prompt_flops(self, length: int) -> float:
        """Of a prompt: every layer for all tokens, the output matrix for the last, the causal half of attention."""
        text = self.text
        head = text.vocab_size * text.hidden_size
        attention = 2 * length**2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
        return 2.0 * ((self.weight_bytes() // 2 - head) * length + head) + attention

    def kv_bytes(self, batch: int, context: int) -> int:
        text = self.text
        return 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * batch * context

    def config(self) -> KeyeConfig:
        return replace(tiny_keye_config(), text=self.text, torch_dtype="bfloat16")


def _text(hidden: int, wide: int, layers: int, heads: int, tied: bool, vocab_size: int = 151936) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=min(8, heads), head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6,
        mrope_section=(16, 24, 24), max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip


GEOMETRIES = {
    "qwen3-0.6b": Geometry("Qwen3-0.6B", _text(1024, 3072, 28, 16, tied=True)),
    "qwen3-8b": Geometry("Qwen3-8B", _text(4096, 12288, 36, 32, tied=False)),
    "keye-quarter": Geometry("a quarter of Keye-VL 8B", _text(4096, 12288, 9, 32, tied=False)),
    "tiny": Geometry("tiny", _text(128, 256, 2, 2, tied=True, vocab_size=320)),
}


def is_text(name: str) -> bool:
    return name.startswith(("model.", "lm_head."))


def write_checkpoint(folder: Path, geometry: Geometry) -> tuple[Path, Path]:
    """Folders of the Keye-VL and the Qwen3 checkpoint; reuses what a complete earlier call left."""
    keye, qwen3 = folder / "keye", folder / "qwen3"
    if not (folder / "complete").exists():
        write_tiny_checkpoint(keye)
        (keye / "model.safetensors").unlink()
        config = geometry.config()
        (keye / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
        files = _write_weights(keye, config)
        (keye / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
        _write_qwen3(qwen3, keye / "text.safetensors", config.text)
        (folder / "complete").touch()
    return keye, qwen3


def _write_weights(folder: Path, config: KeyeConfig) -> dict[str, str]:
    """Two files, so that the text half can be shared; returns the index."""
    values = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    halves: dict[str, dict[str, Tensor]] = {"text": {}, "vision": {}}
    for name, place in places(config).items():
        halves["text" if is_text(name) else "vision"][name] = _random(name, place, values)
    for half, tensors in halves.items():
        save_file(tensors, folder / f"{half}.safetensors", metadata={"format": "pt"})
    return {name: f"{half}.safetensors" for half, tensors in halves.items() for name in tensors}


def _random(name: str, place: Place, values: Tensor) -> Tensor:
    """Matrices that keep the size of what goes through them, norms near one; the drawn values over and over."""
    count = prod(place.shape)
    flat = torch.empty(count, dtype=torch.bfloat16)
    for start in range(0, count, POOL):
        flat[start : start + POOL] = values[: count - start]
    if len(place.shape) == 1:
        return flat.mul_(0.1).add_(float(name.endswith("weight")))
    return flat.mul_(prod(place.shape[1:]) ** -0.5).view(place.shape)


def _write_qwen3(folder: Path, weights: Path, text: TextConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    os.link(weights, folder / "model.safetensors")
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "vocab_size": text.vocab_size, "hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads, "head_dim": text.head_dim, "hidden_act": "silu",
        "rms_norm_eps": text.rms_norm_eps, "rope_theta": text.rope_theta, "attention_bias": False,
        "max_position_embeddings": text.max_position_embeddings, "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
