"""Checkpoints of Keye-VL: the Hub's tensor names to the model's parameters, and back.

Knows names, shapes and which rows of a fused parameter a tensor fills. Every tensor of a checkpoint is loaded or is
on the list of those that the model never uses; anything else is refused by name before a parameter is allocated.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from kvkeye.errors import ConfigError, WeightError
from kvkeye.models.checkpoint import StoredTensor, list_tensors, map_tensors, save_tensors
from kvkeye.models.keye.config import KeyeConfig, TextConfig
from kvkeye.models.keye.model import KeyeModel

_log = logging.getLogger("kvkeye.models.keye")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The pooling head, the table for pre-packed training, and buffers that some versions stored.
_SKIPPED = re.compile(
    r"visual\.vision_model\.head\..+"
    r"|visual\.vision_model\.embeddings\.(packing_position_embedding\.weight|position_ids)"
    r"|(.+\.)?(rotary_emb|rotary_pos_emb)\.inv_freq"
)
# Where a save by a later transformers would put the three parts.
_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.mlp_AR.", "mlp_AR."),
    ("model.language_model.", "model."),
)


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor lives: rows [start, stop) of a parameter, in the checkpoint's own shape."""

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The rows of the parameter that this tensor fills, shaped like the tensor."""
        return parameters[self.parameter].detach()[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class WeightReport:
    """What a folder holds.

    num_parameters   elements of all floating tensors, the skipped ones included
    num_loaded       elements that the model takes
    num_bytes        payload of all files
    skipped          names that the model never uses
    """

    config: KeyeConfig
    num_parameters: int
    num_loaded: int
    num_bytes: int
    skipped: tuple[str, ...]
    files: tuple[Path, ...]


def places(config: KeyeConfig) -> dict[str, Place]:
    """Every tensor that the model needs, by its name in the Hub's layout."""
    return {**_vision_places(config), **_projector_places(config), **_text_places(config.text)}


def _linear(name: str, parameter: str, out: int, inner: int, bias: bool = True) -> dict[str, Place]:
    found = {f"{name}.weight": Place(f"{parameter}.weight", (out, inner))}
    return found | ({f"{name}.bias": Place(f"{parameter}.bias", (out,))} if bias else {})


def _norm(name: str, parameter: str, size: int, bias: bool = True) -> dict[str, Place]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{name}.{kind}": Place(f"{parameter}.{kind}", (size,)) for kind in kinds}


def _fused(parts: dict[str, int], parameter: str, inner: int, bias: bool = False) -> dict[str, Place]:
    """Tensors that stand below each other in one parameter: name to rows."""
    found, start = {}, 0
    for name, rows in parts.items():
        found[f"{name}.weight"] = Place(f"{parameter}.weight", (rows, inner), start, start + rows)
        if bias:
            found[f"{name}.bias"] = Place(f"{parameter}.bias", (rows,), start, start + rows)
        start += rows
    return found


def _vision_places(config: KeyeConfig) -> dict[str, Place]:
    vision = config.vision
    d, wide, side = vision.hidden_size, vision.intermediate_size, vision.patch_size
    base = "visual.vision_model"
    found = {
        f"{base}.embeddings.patch_embedding.weight": Place(
            "visual.patch_embedding.weight", (d, vision.num_channels, side, side)
        ),
        f"{base}.embeddings.patch_embedding.bias": Place("visual.patch_embedding.bias", (d,)),
        f"{base}.embeddings.position_embedding.weight": Place("visual.position_embedding", (vision.grid_size**2, d)),
        **_norm(f"{base}.post_layernorm", "visual.post_layernorm", d),
    }
    for i in range(vision.num_hidden_layers):
        name, layer = f"{base}.encoder.layers.{i}", f"visual.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            found |= _norm(f"{name}.{norm}", f"{layer}.{norm}", d)
        heads = {f"{name}.self_attn.{part}_proj": d for part in "qkv"}
        found |= _fused(heads, f"{layer}.self_attn.qkv_proj", d, bias=True)
        found |= _linear(f"{name}.self_attn.out_proj", f"{layer}.self_attn.out_proj", d, d)
        found |= _linear(f"{name}.mlp.fc1", f"{layer}.mlp.fc1", wide, d)
        found |= _linear(f"{name}.mlp.fc2", f"{layer}.mlp.fc2", d, wide)
    return found


def _projector_places(config: KeyeConfig) -> dict[str, Place]:
    d = config.vision.hidden_size
    merged = d * config.vision.spatial_merge_size**2
    return {
        **_norm("mlp_AR.pre_norm", "projector.pre_norm", d if config.version == "preview" else merged),
        **_linear("mlp_AR.linear_1", "projector.linear_1", merged, merged),
        **_linear("mlp_AR.linear_2", "projector.linear_2", config.text.hidden_size, merged),
    }


def _text_places(text: TextConfig) -> dict[str, Place]:
    d, wide = text.hidden_size, text.intermediate_size
    q_rows, kv_rows = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    found = {
        "model.embed_tokens.weight": Place("language.embed_tokens.weight", (text.vocab_size, d)),
        "model.norm.weight": Place("language.norm.weight", (d,)),
    }
    if not text.tie_word_embeddings:
        found["lm_head.weight"] = Place("language.lm_head.weight", (text.vocab_size, d))
    for i in range(text.num_hidden_layers):
        name, layer = f"model.layers.{i}", f"language.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= _norm(f"{name}.{norm}", f"{layer}.{norm}", d, bias=False)
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        heads = {f"{attention}.q_proj": q_rows, f"{attention}.k_proj": kv_rows, f"{attention}.v_proj": kv_rows}
        found |= _fused(heads, f"{layer}.self_attn.qkv_proj", d)
        found |= _linear(f"{attention}.o_proj", f"{layer}.self_attn.o_proj", d, q_rows, bias=False)
        for norm in ("q_norm", "k_norm"):
            found[f"{attention}.{norm}.weight"] = Place(f"{layer}.self_attn.{norm}", (text.head_dim,))
        found |= _fused({f"{mlp}.gate_proj": wide, f"{mlp}.up_proj": wide}, f"{layer}.mlp.gate_up_proj", d)
        found |= _linear(f"{mlp}.down_proj", f"{layer}.mlp.down_proj", d, wide, bias=False)
    return found


def canonical(name: str) -> str:
    """A tensor's name in the layout visual. / mlp_AR. / model. / lm_head., whichever prefixes the file uses."""
    for prefix, short in _PREFIXES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def check_folder(folder: str | Path) -> WeightReport:
    """Whether this folder is a complete checkpoint; reads JSON and file headers, no payload.

    Raises
        ConfigError  no such folder, or an unusable config.json
        WeightError  every missing, extra, misshapen or wrongly typed tensor, by name and file
    """
    return _match(folder)[1]


def _match(folder: str | Path) -> tuple[list[tuple[Place, StoredTensor]], WeightReport]:
    config = KeyeConfig.from_folder(folder)
    stored = list_tensors(folder)
    wanted = places(config)
    matched: dict[str, StoredTensor] = {}
    problems: list[str] = []
    skipped: list[str] = []
    for name, tensor in stored.items():
        short = canonical(name)
        if short not in wanted:
            if _is_skipped(short, config):
                skipped.append(name)
            else:
                problems.append(f"extra: {name} in {tensor.file.name}")
        elif short in matched:
            problems.append(f"twice: {name} and {matched[short].name}")
        else:
            matched[short] = tensor
            problems += _misfit(short, tensor, wanted[short])
    problems += [f"missing: {name}" for name in wanted if name not in matched]
    if problems:
        raise WeightError(_refusal(Path(folder), problems, {t.file.name for t in stored.values()}))
    floats = [t for t in stored.values() if t.dtype.is_floating_point]
    report = WeightReport(
        config=config,
        num_parameters=sum(t.num_elements for t in floats),
        num_loaded=sum(t.num_elements for t in matched.values()),
        num_bytes=sum(t.num_bytes for t in stored.values()),
        skipped=tuple(sorted(skipped)),
        files=tuple(sorted({t.file for t in stored.values()})),
    )
    return [(wanted[name], tensor) for name, tensor in matched.items()], report


def _is_skipped(name: str, config: KeyeConfig) -> bool:
    tied = config.text.tie_word_embeddings and name == "lm_head.weight"
    return tied or _SKIPPED.fullmatch(name) is not None


def _misfit(name: str, tensor: StoredTensor, place: Place) -> list[str]:
    where = f"{tensor.name} in {tensor.file.name}"
    found = []
    if tensor.shape != place.shape:
        hint = ""
        if name.startswith("mlp_AR.pre_norm."):
            hint = " (Preview normalises before the merge, 1.5 after it: does config.json name the right one?)"
        found.append(f"shape: {where} is {list(tensor.shape)}, config.json requires {list(place.shape)}{hint}")
    if tensor.dtype not in FLOATS:
        found.append(f"dtype: {where} is {_plain(tensor.dtype)}, required is float32, bfloat16 or float16")
    return found


def _refusal(folder: Path, problems: list[str], files: set[str]) -> str:
    shown = "\n  ".join(problems[:16])
    more = f"\n  and {len(problems) - 16} more" if len(problems) > 16 else ""
    return (
        f"{folder}: the tensors of {', '.join(sorted(files))} do not fit the model of config.json "
        f"({len(problems)} faults).\n  {shown}{more}\n"
        "Each tensor must be the model's or one it is known to skip. Use a complete, unmodified checkpoint."
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> KeyeModel:
    """The model of a checkpoint folder, ready for inference.

    Args     dtype     of all parameters; None takes the one that config.json names
             progress  called with (bytes copied, bytes in all) after each tensor
    Memory   the parameters once; files are mapped and their pages can be dropped
    Raises   as check_folder, before anything is allocated
    """
    matched, report = _match(folder)
    dtype = dtype or _config_dtype(report.config)
    with torch.device("meta"):
        model = KeyeModel(report.config)
    model = model.to(dtype).to_empty(device=device).eval()
    parameters = dict(model.named_parameters())
    by_name = {tensor.name: place for place, tensor in matched}
    done, total = 0, sum(tensor.num_bytes for _, tensor in matched)
    with torch.no_grad():
        for stored, data in map_tensors([tensor for _, tensor in matched]):
            by_name[stored.name].view(parameters).copy_(data)
            done += stored.num_bytes
            if progress is not None:
                progress(done, total)
    _log.info("loaded %d parameters as %s from %s", report.num_loaded, _plain(dtype), folder)
    return model


def _config_dtype(config: KeyeConfig) -> torch.dtype:
    by_name = {_plain(dtype): dtype for dtype in FLOATS}
    if config.torch_dtype not in by_name:
        raise ConfigError(
            f"config.json: torch_dtype={config.torch_dtype!r}; required is one of {', '.join(by_name)}. "
            "Pass a dtype to override it."
        )
    return by_name[config.torch_dtype]


def save_model(model: KeyeModel, folder: str | Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Writes config.json and the weights in the Hub's names and layout; returns the weight files.

    Args     dtype  of the written tensors; None keeps the model's
    Writes   one tensor at a time; a file appears under its name when it is complete
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.dtype
    config = replace(model.config, torch_dtype=_plain(dtype))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    parameters = model.state_dict()  # plain weights, whatever form the model computes with
    return save_tensors(folder, {name: place.view(parameters) for name, place in places(config).items()}, dtype)


def num_parameters(config: KeyeConfig) -> int:
    """Parameters that a model of this configuration holds."""
    return sum(prod(place.shape) for place in places(config).values())
