"""Folders of draft heads: `config.json` and `model.safetensors` in the public EAGLE-3 tensor names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kvkeye.errors import ConfigError, WeightError
from kvkeye.models.checkpoint import StoredTensor, list_tensors, map_tensors, save_tensors
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.weights import FLOATS, Place, canonical

D2T = "d2t"  # [Vd] int64: a target id minus the head's own


def target_hash(folder: str | Path) -> str:
    """Names a checkpoint: sha256 over its text configuration and its norm weights as they are stored, length-framed.

    Reads a few pages of the payload, whatever the size of the checkpoint.
    """
    text = KeyeConfig.from_folder(folder).text
    digest = hashlib.sha256(b"kvkeye.target 1")
    norms = [stored for stored in list_tensors(folder).values() if len(stored.shape) == 1]
    named = {canonical(stored.name): (stored, data) for stored, data in map_tensors(norms)}
    parts = [json.dumps(asdict(text), sort_keys=True).encode()]
    for name in sorted(name for name in named if name.startswith("model.")):
        stored, data = named[name]
        parts += [f"{name} {stored.dtype}".encode(), data.contiguous().view(torch.uint8).numpy().tobytes()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def places(config: HeadConfig) -> dict[str, Place]:
    """Every floating tensor of a head by its name in the file."""
    h, wide, d = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * d, config.num_key_value_heads * d
    layer, attention, mlp = "midlayer", "midlayer.self_attn", "midlayer.mlp"
    found = {
        "fc.weight": Place("fc.weight", (h, 3 * h)),
        "norm.weight": Place("norm.weight", (h,)),
        "lm_head.weight": Place("lm_head.weight", (config.draft_vocab_size, h)),
        f"{attention}.o_proj.weight": Place(f"{attention}.o_proj.weight", (h, q_rows)),
        f"{mlp}.down_proj.weight": Place(f"{mlp}.down_proj.weight", (h, wide)),
    }
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        found[f"{layer}.{norm}.weight"] = Place(f"{layer}.{norm}.weight", (h,))
    for norm in ("q_norm", "k_norm"):
        found[f"{attention}.{norm}.weight"] = Place(f"{attention}.{norm}", (d,))
    start = 0
    for part, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
        found[f"{attention}.{part}.weight"] = Place(f"{attention}.qkv_proj.weight", (rows, 2 * h), start, start + rows)
        start += rows
    for part, start in (("gate_proj", 0), ("up_proj", wide)):
        found[f"{mlp}.{part}.weight"] = Place(f"{mlp}.gate_up_proj.weight", (wide, h), start, start + wide)
    return found


def save_head(head: DraftHead, folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Writes a head with these weights, by parameter name, rounded to `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    head.config.save(folder)
    tensors = {name: place.view(weights) for name, place in places(head.config).items()}
    if head.config.is_reduced:
        tensors[D2T] = head.token_ids - torch.arange(len(head.token_ids))
    save_tensors(folder, tensors, dtype)


def load_head(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> DraftHead:
    """The head of a folder, ready for inference.

    Raises
        ConfigError  no such folder, or an unusable config.json
        WeightError  a missing, extra, misshapen or wrongly typed tensor, by name
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"draft head: {str(folder)!r} is not a folder; `kvkeye train draft.toml` writes one.")
    config = HeadConfig.from_folder(folder)
    wanted, stored = places(config), list_tensors(folder)
    if faults := _faults(config, wanted, stored):
        raise WeightError(f"{folder}: not the head of its config.json. " + "; ".join(faults[:8]) + ".")
    head = DraftHead(config).to(dtype).to(device).eval()
    parameters = dict(head.named_parameters())
    with torch.no_grad():
        for tensor, data in map_tensors(stored.values()):
            if tensor.name == D2T:
                head.token_ids += data.to(device)
            else:
                wanted[tensor.name].view(parameters).copy_(data)
    if int(head.token_ids.min()) < 0 or int(head.token_ids.max()) >= config.vocab_size:
        raise WeightError(f"{folder}: {D2T} names tokens outside the vocabulary of {config.vocab_size}.")
    return head


def _faults(config: HeadConfig, wanted: Mapping[str, Place], stored: Mapping[str, StoredTensor]) -> list[str]:
    shapes = {name: place.shape for name, place in wanted.items()}
    if config.is_reduced:
        shapes[D2T] = (config.draft_vocab_size,)
    faults = [f"missing: {name}" for name in shapes if name not in stored]
    for name, tensor in stored.items():
        kinds = (torch.int64,) if name == D2T else FLOATS
        if name not in shapes:
            faults.append(f"extra: {name}")
        elif tensor.shape != shapes[name] or tensor.dtype not in kinds:
            faults.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, required is {kinds[0]} {list(shapes[name])}")
    return faults
