"""A model small enough to train within a test, and its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.train.checkpoint import export, model_config
from kvkeye.train.trainer import initialise

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 128, "rope_theta": 100.0,
    "vision": {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1},
}  # fmt: skip
RECIPE = """
name = "small"
output = "{output}"
steps = {steps}
save_every = {save_every}
report_every = 2

[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 128
rope_theta = 100.0

[model.vision]
hidden_size = 72
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 1

[optimizer]
lr = 2e-3
muon_lr = 2e-3
warmup = 2
decay = 4
ema = 0.9

[[stages]]
start = 0
answers = false
kinds = {{ objects = 1.0 }}
images = 2
patch_weight = 1.0

[[stages]]
start = 2
kinds = {{ objects = 0.7, clip = 0.3 }}
images = 2
patch_weight = 0.5
"""


def small_model() -> KeyeModel:
    model = KeyeModel(KeyeConfig.from_dict(model_config(SIZES)))
    initialise(model, 0)
    return model


def exported(folder: Path) -> Path:
    """A checkpoint folder with starting weights."""
    model = small_model()
    export(model, dict(model.named_parameters()), SIZES, folder)
    return folder


def write_recipe(folder: Path, steps: int = 8, save_every: int = 4) -> Path:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(output=folder / "out", steps=steps, save_every=save_every))
    return path
