"""Folders of draft heads: what is written is read back, and what does not fit is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvkeye.errors import ConfigError, WeightError
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.draft.weights import load_head, save_head, target_hash
from kvkeye.models.keye.weights import load_model, save_model
from kvkeye.testing.tiny import tiny_keye_config, write_tiny_checkpoint

TEXT = tiny_keye_config().text


def written(folder, **sizes):
    head = DraftHead(HeadConfig.for_target(TEXT, "ab" * 32, (0, 1, 2), **sizes))
    if head.config.is_reduced:
        head.token_ids.copy_(torch.randperm(TEXT.vocab_size)[: len(head.token_ids)])
    save_head(head, folder, dict(head.named_parameters()), torch.bfloat16)
    return head


@pytest.mark.parametrize("count", [TEXT.vocab_size, 50])
def test_a_folder_gives_the_head_back(tmp_path, count):
    head = written(tmp_path, draft_vocab_size=count, intermediate_size=96)
    found = load_head(tmp_path, torch.float32)
    assert found.config == head.config and torch.equal(found.token_ids, head.token_ids)
    for name, parameter in head.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], parameter.to(torch.bfloat16).float()), name


def test_names_are_those_of_public_heads(tmp_path):
    head = written(tmp_path, draft_vocab_size=50)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        offsets = file.get_tensor("d2t")
    layer = {f"midlayer.self_attn.{part}_proj.weight" for part in "qkvo"}
    layer |= {f"midlayer.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    layer |= {f"midlayer.{norm}.weight" for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    assert names - layer - {f"midlayer.self_attn.{part}_norm.weight" for part in "qk"} == {
        "fc.weight", "norm.weight", "lm_head.weight", "d2t",
    }  # fmt: skip
    assert torch.equal(offsets + torch.arange(50), head.token_ids) and offsets.dtype == torch.int64


def test_a_target_is_named_by_its_weights_as_stored(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "a")
    name = target_hash(folder)
    assert name == target_hash(write_tiny_checkpoint(tmp_path / "b"))
    assert name != target_hash(write_tiny_checkpoint(tmp_path / "c", seed=1))
    model = load_model(folder, torch.float32)
    model.language.layers[0].self_attn.q_norm.data[3] += 1
    save_model(model, folder)
    assert target_hash(folder) != name


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a folder; `kvkeye train draft.toml` writes one"):
        load_head(tmp_path / "nowhere", torch.float32)
    written(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({"more": torch.zeros(2)} | {n: t for n, t in tensors.items() if n != "fc.weight"}, file)
    with pytest.raises(WeightError, match=r"missing: fc.weight; extra: more"):
        load_head(tmp_path, torch.float32)
    save_file(tensors | {"norm.weight": torch.zeros(3)}, file)
    with pytest.raises(WeightError, match=r"norm.weight is torch.float32 \[3\], required is torch.float32 \[128\]"):
        load_head(tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architectures": ["Other"]}, "required is ['KvkeyeEagle3Head']"),
        ({"feature_layers": [2, 1, 0]}, "required are three ascending numbers of layers"),
        ({"head_dim": "wide"}, "head_dim='wide'; required is an integer of at least 1"),
        ({"draft_vocab_size": 4000}, "draft_vocab_size=4000; required is at most vocab_size, 320"),
        ({"rope_theta": -1}, "rope_theta=-1; required is a finite number above 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError) as error:
            load_head(tmp_path, torch.float32)
        assert message in str(error.value)
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="field 'head_dim' is missing"):
        load_head(tmp_path, torch.float32)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    written(tmp_path, draft_vocab_size=50)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"d2t": torch.full((50,), 300)}, file)
    with pytest.raises(WeightError, match="d2t names tokens outside the vocabulary of 320"):
        load_head(tmp_path, torch.float32)
