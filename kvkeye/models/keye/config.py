"""The numbers of a Keye-VL checkpoint, read from its `config.json` and checked.

Knows the Hub's file layout (flat text fields, nested `vision_config`); must not know torch or tokens' text.
The defaults of the reference's configuration class are wrong for this family, so a missing field is an error,
except for the few vision fields that the published files leave to the class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kvkeye.errors import ConfigError

Version = Literal["preview", "1.5"]
JsonDict = dict[str, Any]

ARCHITECTURES: dict[str, Version] = {
    "KeyeForConditionalGeneration": "preview",
    "KeyeVL1_5ForConditionalGeneration": "1.5",
}
MODEL_TYPES: dict[str, Version] = {"Keye": "preview", "KeyeVL1_5": "1.5"}
MAX_JSON_BYTES = 64 << 20  # tokenizer.json of a 152k vocabulary is 11 MB


@dataclass(frozen=True)
class VisionConfig:
    """Vision tower: SigLIP shape at native resolution. Sizes in pixels or channels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    spatial_merge_size: int
    tokens_per_second: float
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Side of the square table of absolute positions (27 in the 8B checkpoints)."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch (588)."""
        return self.num_channels * self.patch_size**2


@dataclass(frozen=True)
class TextConfig:
    """Language model: Qwen3 with sectioned mRoPE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: str = "silu"


@dataclass(frozen=True)
class KeyeConfig:
    """One checkpoint. `eos_token_ids` are those of `config.json`; the generation defaults may add more."""

    version: Version
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    torch_dtype: str = "bfloat16"

    @classmethod
    def from_folder(cls, folder: str | Path) -> KeyeConfig:
        """Reads `folder/config.json`. Raises `ConfigError` that names the file and the field."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(
                f"model folder: {str(folder)!r} is not a folder; required is one with config.json and "
                "*.safetensors. Check the path, or download the checkpoint first."
            )
        return cls.from_dict(read_json(folder / "config.json"), where=str(folder / "config.json"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config.json") -> KeyeConfig:
        """Reads the dictionary of a `config.json`; `where` is what error messages call it."""
        version = _version(data, where)
        nested = data.get("text_config")
        text_data = {**data, **nested} if isinstance(nested, Mapping) else data
        text = _text_config(_Fields(text_data, where))
        top = _Fields(data, where)
        config = cls(
            version=version,
            vision=_vision_config(top.section("vision_config"), version),
            text=text,
            image_token_id=top.integer("image_token_id", minimum=0),
            video_token_id=top.integer("video_token_id", minimum=0),
            vision_start_token_id=top.integer("vision_start_token_id", minimum=0),
            vision_end_token_id=top.integer("vision_end_token_id", minimum=0),
            eos_token_ids=_token_ids(text_data.get("eos_token_id"), where),
            bos_token_id=None if text_data.get("bos_token_id") is None else top.integer("bos_token_id", minimum=0),
            torch_dtype=str(data.get("torch_dtype") or data.get("dtype") or "bfloat16"),
        )
        _check_token_ids(config, where)
        return config

    def to_dict(self) -> JsonDict:
        """The `config.json` of this checkpoint in the Hub's flat layout; `from_dict` reads it back."""
        text = asdict(self.text)
        section = list(text.pop("mrope_section"))
        data: JsonDict = {
            "architectures": [name for name, version in ARCHITECTURES.items() if version == self.version],
            "model_type": next(name for name, version in MODEL_TYPES.items() if version == self.version),
            **text,
            "attention_bias": False,
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids),
            "torch_dtype": self.torch_dtype,
            "vision_config": asdict(self.vision),
        }
        for name in ("image", "video", "vision_start", "vision_end"):
            data[f"{name}_token_id"] = getattr(self, f"{name}_token_id")
        if self.bos_token_id is not None:
            data["bos_token_id"] = self.bos_token_id
        return data


def read_json(path: Path) -> JsonDict:
    """A JSON object from a file of at most 64 MiB. Raises `ConfigError` that names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read as JSON.")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a checkpoint folder needs it. Download it again.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error}). Download the file again.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; a JSON object is required.")
    return data


class _Fields:
    """Typed look-up in one JSON object; every complaint names the file and the field."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def _number(self, name: str, default: float | None) -> Any:
        value = self.data.get(name)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"{self.where}: field {name!r} is missing; it has no safe default. "
                    "Use the checkpoint's complete config.json."
                )
            return default
        return value

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._number(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            self.refuse(name, value, f"an integer of at least {minimum}")
        return int(value)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._number(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(name, value, "a number")
        if not math.isfinite(value) or value <= 0:
            self.refuse(name, value, "a finite number above 0")
        return float(value)

    def only(self, name: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """A field of which this program implements a few values; absent or null means `default`."""
        value = self.data.get(name)
        value = default if value is None else value
        if value not in allowed:
            self.refuse(name, value, " or ".join(repr(item) for item in allowed) + " (nothing else is implemented)")
        return value

    def section(self, name: str) -> _Fields:
        value = self.data.get(name)
        if not isinstance(value, Mapping):
            self.refuse(name, value, "a JSON object")
        return _Fields(self.data[name], f"{self.where}: {name}")

    def refuse(self, name: str, value: Any, required: str) -> None:
        raise ConfigError(f"{self.where}: {name}={value!r}; required is {required}. Correct the checkpoint's JSON.")


def _version(data: Mapping[str, Any], where: str) -> Version:
    names = data.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else None
    model_type = data.get("model_type")
    found = {ARCHITECTURES.get(str(architecture)), MODEL_TYPES.get(str(model_type))} - {None}
    known = all(
        value is None or value in table for value, table in ((architecture, ARCHITECTURES), (model_type, MODEL_TYPES))
    )
    if len(found) != 1 or not known:
        raise ConfigError(
            f"{where}: architectures={names!r}, model_type={model_type!r}; supported are "
            f"{', '.join(ARCHITECTURES)} with model_type {' or '.join(MODEL_TYPES)}. "
            "Use a Keye-VL Preview or 1.5 checkpoint."
        )
    return found.pop()  # type: ignore[return-value]


def _vision_config(fields: _Fields, version: Version) -> VisionConfig:
    vision = VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        spatial_merge_size=fields.integer("spatial_merge_size"),
        # 1.5 places each frame in a block of its own and never uses the clock.
        tokens_per_second=fields.real("tokens_per_second", None if version == "preview" else 2.0),
        num_channels=fields.only("num_channels", (3,), 3),
        hidden_act=fields.only("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
        layer_norm_eps=fields.real("layer_norm_eps", 1e-6),
        rope_theta=fields.real("rope_theta", 10000.0),
    )
    if vision.hidden_size % vision.num_attention_heads or vision.head_dim % 4:
        fields.refuse(
            "num_attention_heads",
            vision.num_attention_heads,
            f"a divisor of hidden_size {vision.hidden_size} that leaves a head size divisible by 4",
        )
    if vision.image_size < vision.patch_size:
        fields.refuse("image_size", vision.image_size, f"at least patch_size {vision.patch_size}")
    return vision


def _rope(fields: _Fields) -> tuple[float, tuple[int, int, int]]:
    """Base and sections. mRoPE is known by its sections: re-saving rewrites the type string to "default"."""
    sources = [fields.data.get(name) for name in ("rope_scaling", "rope_parameters")]
    tables = [table for table in sources if isinstance(table, Mapping)]
    section = next((table["mrope_section"] for table in tables if "mrope_section" in table), None)
    if (
        not isinstance(section, list)
        or len(section) != 3
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in section)
    ):
        fields.refuse("rope_scaling.mrope_section", section, "a list of three lengths, here or in rope_parameters")
    for table in tables:
        scaling = _Fields(table, f"{fields.where}: rope_scaling")
        scaling.only("type", ("mrope", "default"), "mrope")
        scaling.only("rope_type", ("mrope", "default"), "mrope")
    holder = next((table for table in tables if table.get("rope_theta") is not None), fields.data)
    if fields.data.get("rope_theta") is not None:
        holder = fields.data
    return _Fields(holder, fields.where).real("rope_theta"), (section[0], section[1], section[2])  # type: ignore[index]


def _text_config(fields: _Fields) -> TextConfig:
    fields.only("attention_bias", (False,), False)
    fields.only("use_sliding_window", (False,), False)
    rope_theta, section = _rope(fields)
    tied = fields.data.get("tie_word_embeddings")
    if not isinstance(tied, bool):
        fields.refuse("tie_word_embeddings", tied, "true or false")
    text = TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        rms_norm_eps=fields.real("rms_norm_eps"),
        rope_theta=rope_theta,
        mrope_section=section,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=bool(tied),
        hidden_act=fields.only("hidden_act", ("silu",), None),
    )
    if 2 * sum(section) != text.head_dim:
        fields.refuse("mrope_section", list(section), f"lengths that sum to head_dim/2 = {text.head_dim / 2:g}")
    if text.num_attention_heads % text.num_key_value_heads:
        fields.refuse("num_key_value_heads", text.num_key_value_heads, f"a divisor of {text.num_attention_heads}")
    return text


def _token_ids(value: Any, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ConfigError(f"{where}: eos_token_id={value!r}; required is a token id or a list of them.")
    return tuple(ids)


def _check_token_ids(config: KeyeConfig, where: str) -> None:
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in names}
    ids.update({f"eos_token_id[{i}]": token for i, token in enumerate(config.eos_token_ids)})
    for name, token in ids.items():
        if not 0 <= token < config.text.vocab_size:
            raise ConfigError(f"{where}: {name}={token}; required is an id below vocab_size {config.text.vocab_size}.")
    if config.image_token_id == config.video_token_id:
        raise ConfigError(
            f"{where}: image_token_id and video_token_id are both {config.image_token_id}; they must differ."
        )
