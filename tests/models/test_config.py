"""`config.json` in, checked numbers out; every refusal names the field."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from kvkeye.errors import ConfigError
from kvkeye.models.keye.config import KeyeConfig

# The published Preview file's numbers.
PREVIEW = {
    "architectures": ["KeyeForConditionalGeneration"],
    "model_type": "Keye",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "model_type": "siglip_vision_model",
    },
}


def changed(**fields: object) -> dict[str, object]:
    data = copy.deepcopy(PREVIEW)
    for name, value in fields.items():
        target, _, leaf = name.rpartition("__")
        holder = data[target] if target else data
        if value is ...:
            del holder[leaf]
        else:
            holder[leaf] = value
    return data


def test_preview_numbers():
    config = KeyeConfig.from_dict(PREVIEW)
    assert config.version == "preview"
    assert config.vision.head_dim == 72 and config.vision.grid_size == 27 and config.vision.patch_dim == 588
    assert config.vision.layer_norm_eps == 1e-6 and config.vision.rope_theta == 10000.0
    assert config.vision.hidden_act == "gelu_pytorch_tanh"
    assert config.text.mrope_section == (16, 24, 24) and config.text.rope_theta == 1e6
    assert config.eos_token_ids == (151645,) and config.text.tie_word_embeddings is False


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_round_trip(version):
    data = PREVIEW
    if version == "1.5":
        data = changed(architectures=["KeyeVL1_5ForConditionalGeneration"], model_type="KeyeVL1_5", rope_theta=8e6)
    config = KeyeConfig.from_dict(data)
    assert config.version == version
    assert KeyeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}},
        {
            "rope_scaling": None,
            "rope_theta": ...,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        {
            "rope_scaling": {"mrope_section": [16, 24, 24]},
            "rope_theta": ...,
            "rope_parameters": {"rope_theta": 1e6},
        },
    ],
)
def test_mrope_is_known_by_its_sections(rope):
    text = KeyeConfig.from_dict(changed(**rope)).text
    assert (text.rope_theta, text.mrope_section) == (1e6, (16, 24, 24))


def test_vision_rope_theta_and_nested_text_config():
    data = changed(vision_config__rope_theta=50000)
    nested = {name: data.pop(name) for name in ("hidden_size", "num_hidden_layers", "rope_scaling", "eos_token_id")}
    config = KeyeConfig.from_dict({**data, "text_config": nested})
    assert config.vision.rope_theta == 50000.0 and config.text.hidden_size == 4096


REQUIRED = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size",
    "tie_word_embeddings", "eos_token_id", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_config", "hidden_act", "vision_config__hidden_size",
    "vision_config__intermediate_size", "vision_config__num_hidden_layers",
    "vision_config__num_attention_heads", "vision_config__image_size", "vision_config__patch_size",
    "vision_config__spatial_merge_size", "vision_config__tokens_per_second",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(name):
    with pytest.raises(ConfigError, match=name.rpartition("__")[2]):
        KeyeConfig.from_dict(changed(**{name: ...}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": True}, "hidden_size=True"),
        ({"hidden_size": "4096"}, "hidden_size='4096'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [16, 24, 24]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope_section"),
        ({"rope_scaling": {"mrope_section": [16, 24, 25]}}, "head_dim/2 = 64"),
        ({"rope_scaling": {"mrope_section": [16, 24]}}, "three"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"image_token_id": 151936}, "vocab_size 151936"),
        ({"image_token_id": 151656}, "must differ"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"vision_config__num_attention_heads": 7}, "num_attention_heads"),
        ({"vision_config__hidden_act": "gelu"}, "hidden_act"),
        ({"vision_config__num_channels": 4}, "num_channels"),
    ],
)
def test_an_unusable_value_is_named(fields, says):
    with pytest.raises(ConfigError, match=says):
        KeyeConfig.from_dict(changed(**fields))


@pytest.mark.parametrize(
    "names",
    [
        {"architectures": ["KeyeVL2MoeForConditionalGeneration"], "model_type": "KeyeVL2"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        {"architectures": ..., "model_type": ...},
        {"architectures": ["KeyeForConditionalGeneration"], "model_type": "KeyeVL1_5"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "Keye"},
    ],
)
def test_other_models_are_refused_with_the_list(names):
    with pytest.raises(ConfigError, match="KeyeForConditionalGeneration, KeyeVL1_5ForConditionalGeneration"):
        KeyeConfig.from_dict(changed(**names))


def test_folders(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        KeyeConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        KeyeConfig.from_folder(tmp_path)
    path = tmp_path / "config.json"
    for content, says in (
        (b"\xff\xfe{", "not readable as JSON"),
        (b"[1]", "list"),
        (b"[" * 100000, "not readable"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            KeyeConfig.from_folder(tmp_path)
    path.write_text(json.dumps(PREVIEW))
    assert KeyeConfig.from_folder(tmp_path) == KeyeConfig.from_dict(PREVIEW)


def test_reading_a_configuration_costs_no_torch():
    code = "import sys, kvkeye.models.keye.config, kvkeye.models.keye.parsing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
