"""The numbers of a draft head, read from its `config.json` and checked. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError
from kvkeye.models.keye.config import TextConfig, read_json

ARCHITECTURE = "KvkeyeEagle3Head"


@dataclass(frozen=True)
class HeadConfig:
    """One head.

    hidden_size         the target's too
    draft_vocab_size    tokens that it can propose, at most vocab_size
    feature_layers      it sees the target's residual stream behind so many layers; three numbers, ascending
    target_hash         of the checkpoint it was trained for; see weights.target_hash
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    feature_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    target_hash: str

    @property
    def is_reduced(self) -> bool:
        return self.draft_vocab_size < self.vocab_size

    @classmethod
    def for_target(
        cls, text: TextConfig, target_hash: str, feature_layers: tuple[int, ...], **sizes: int
    ) -> HeadConfig:
        """A head in the target's geometry; `sizes` replaces some of it. Raises ConfigError."""
        wanted = {item.name for item in fields(cls)}
        same = {name: value for name, value in asdict(text).items() if name in wanted}
        values = {**same, "draft_vocab_size": text.vocab_size, **sizes}
        config = cls(**values, target_hash=target_hash, feature_layers=tuple(feature_layers))
        config.check("draft head")
        config.check_target(text, "draft head")
        return config

    @classmethod
    def from_folder(cls, folder: str | Path) -> HeadConfig:
        """Reads `folder/config.json`. Raises ConfigError that names the file and the field."""
        path = Path(folder) / "config.json"
        data = read_json(path)
        if data.get("architectures") != [ARCHITECTURE]:
            raise ConfigError(
                f"{path}: architectures={data.get('architectures')!r}; required is [{ARCHITECTURE!r}]. Pass a folder "
                "that `kvkeye train draft.toml` wrote."
            )
        values: dict[str, Any] = {}
        for item in fields(cls):
            if item.name not in data:
                raise ConfigError(f"{path}: field {item.name!r} is missing. Train the head again, or copy it whole.")
            value = data[item.name]
            values[item.name] = tuple(value) if isinstance(value, list) else value
        config = cls(**values)
        config.check(str(path))
        return config

    def to_dict(self) -> Mapping[str, Any]:
        return {"architectures": [ARCHITECTURE], **asdict(self)}

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def check(self, where: str) -> None:
        """Raises ConfigError for a value of the wrong type or range."""
        counts = (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "draft_vocab_size",
        )  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{where}: {name}={value!r}; required is an integer of at least 1.")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigError(f"{where}: {name}={value!r}; required is a finite number above 0.")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"{where}: draft_vocab_size={self.draft_vocab_size}; required is at most vocab_size, {self.vocab_size}."
            )
        layers = self.feature_layers
        whole = isinstance(layers, tuple) and len(layers) == 3 and all(type(layer) is int for layer in layers)
        if not whole or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ConfigError(
                f"{where}: feature_layers={layers!r}; required are three ascending numbers of layers, from 0."
            )

    def check_target(self, text: TextConfig, where: str) -> None:
        """Raises ConfigError where the head does not fit a target of these sizes."""
        for name in ("hidden_size", "vocab_size"):
            own, theirs = getattr(self, name), getattr(text, name)
            if own != theirs:
                raise ConfigError(f"{where}: {name}={own}; the target has {theirs}. Train a head for this target.")
        if self.feature_layers[-1] > text.num_hidden_layers:
            raise ConfigError(
                f"{where}: feature_layers={list(self.feature_layers)}; the target has {text.num_hidden_layers} layers."
            )
