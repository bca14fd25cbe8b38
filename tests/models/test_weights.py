"""Checkpoint folders: every tensor is placed, skipped by name, or refused by name before anything is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvkeye.errors import ConfigError, WeightError
from kvkeye.models import checkpoint
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.weights import check_folder, load_model, num_parameters, places, save_model
from kvkeye.models.registry import FAMILIES, family_of
from kvkeye.testing.tiny import tiny_keye_config, tiny_keye_model, write_tiny_checkpoint
from tests.models.test_config import PREVIEW

FILE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
PATCH_BIAS = "visual.vision_model.embeddings.patch_embedding.bias"
EXTRAS = {
    "visual.vision_model.embeddings.packing_position_embedding.weight": (64, 144),
    "visual.vision_model.head.probe": (1, 1, 144),
    "visual.vision_model.head.attention.in_proj_weight": (432, 144),
    "visual.vision_model.head.mlp.fc1.bias": (256,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (64,),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def same_parameters(a: KeyeModel, b: KeyeModel) -> bool:
    other = dict(b.named_parameters())
    return all(torch.equal(p, other[n]) for n, p in a.named_parameters())


def test_the_public_reader_sees_the_hubs_layout(folder):
    tensors = load_file(folder / FILE)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: place.shape for name, place in places(tiny_keye_config()).items()
    }
    model = tiny_keye_model()
    qkv = model.language.layers[1].self_attn.qkv_proj.weight
    parts = [tensors[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(torch.cat(parts), qkv)
    gate_up = model.language.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(tensors["model.layers.0.mlp.gate_proj.weight"], gate_up[:256])
    assert torch.equal(tensors["model.layers.0.mlp.up_proj.weight"], gate_up[256:])
    vision = model.visual.layers[1].self_attn.qkv_proj.bias
    assert torch.equal(tensors["visual.vision_model.encoder.layers.1.self_attn.v_proj.bias"], vision[288:])


@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_round_trip(tmp_path, version):
    write_tiny_checkpoint(tmp_path, version, seed=7)
    model = load_model(tmp_path)
    assert same_parameters(model, tiny_keye_model(version, seed=7)) and not model.training
    assert model.dtype == torch.float32 and model.config == KeyeConfig.from_folder(tmp_path)
    assert check_folder(tmp_path).num_parameters == num_parameters(model.config)


def test_every_element_of_every_parameter_is_placed_once():
    for config in (tiny_keye_config(), tiny_keye_config("1.5"), tiny_keye_config(tie_word_embeddings=True)):
        parameters = dict(KeyeModel(config).named_parameters())
        for parameter in parameters.values():
            parameter.data.zero_()
        for place in places(config).values():
            place.view(parameters).add_(1)
        assert all(bool((parameter == 1).all()) for parameter in parameters.values())


def test_dtypes_are_converted(folder):
    wanted = tiny_keye_model().to(torch.bfloat16)
    assert same_parameters(load_model(folder, torch.bfloat16), wanted)
    save_model(wanted, folder)
    assert load_file(folder / FILE)[Q_PROJ].dtype == torch.bfloat16
    assert load_model(folder).dtype == torch.bfloat16  # config.json says so
    assert same_parameters(load_model(folder, torch.float32), wanted.float())


def test_shards(folder, monkeypatch):
    tensors = load_file(folder / FILE)
    checkpoint.save_tensors(folder, tensors, torch.float32, max_shard_bytes=1_500_000)
    (folder / FILE).unlink()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 4 and sum(f.stat().st_size for f in files) > 5_000_000
    assert same_parameters(load_model(folder), tiny_keye_model())


def test_later_prefixes(folder):
    def change(tensors):
        for name in list(tensors):
            if name.startswith(("visual.", "mlp_AR.")):
                tensors[f"model.{name}"] = tensors.pop(name)
            elif name.startswith("model."):
                tensors["model.language_model." + name.removeprefix("model.")] = tensors.pop(name)

    rewrite(folder, change)
    assert same_parameters(load_model(folder), tiny_keye_model())


def test_unused_tensors_are_skipped_by_name(folder):
    def change(tensors):
        tensors.update({name: torch.zeros(shape) for name, shape in EXTRAS.items()})
        tensors["visual.vision_model.embeddings.position_ids"] = torch.arange(49)[None]

    rewrite(folder, change)
    report = check_folder(folder)
    assert set(report.skipped) == {*EXTRAS, "visual.vision_model.embeddings.position_ids"}
    assert report.num_loaded == num_parameters(report.config)
    extra = sum(torch.Size(shape).numel() for shape in EXTRAS.values())
    assert report.num_parameters == report.num_loaded + extra
    assert same_parameters(load_model(folder), tiny_keye_model())


def test_a_tied_head_is_skipped(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert check_folder(folder).skipped == ("lm_head.weight",)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert load_model(folder).language.lm_head is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(Q_PROJ), f"missing: {Q_PROJ}"),
        (lambda t: t.update({"model.layers.2.norm.weight": torch.ones(1)}), r"extra: model.layers.2.norm.weight in"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].T[:, :-1].contiguous()}), rf"shape: {Q_PROJ} in .*\[256, 128\]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].long()}), rf"dtype: {Q_PROJ} in model.safetensors is int64"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}), "is float8_e4m3fn"),
        (lambda t: t.update({f"model.{PATCH_BIAS}": torch.ones(144)}), f"twice: .*{PATCH_BIAS} and .*{PATCH_BIAS}"),
        (lambda t: t.update({"mlp_AR.pre_norm.bias": torch.ones(576)}), "after it: does config.json name"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("mlp_AR")], r"\(6 faults\).*missing: mlp_AR"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    rewrite(folder, change)
    for function in (check_folder, load_model):
        with pytest.raises(WeightError, match=f"(?s){says}"):
            function(folder)


def header(entries: object, payload: int = 0, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(payload)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04 a zip", "not a safetensors file"),
        (header({}, length=1 << 62), "not a safetensors file"),
        (header({"a": F32}, 8, length=1 << 27), "not a safetensors file"),
        (header(b"{"), "not JSON"),
        (header(b"\xff\xfe"), "not JSON"),
        (header(b"[" * 100_000), "not JSON"),
        (header(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (header([1]), "list"),
        (header(b'{"a": {}, "a": {}}'), "a appears twice"),
        (header({"a": 3}), "a has dtype None"),
        (header({"a": {**F32, "dtype": "Q4"}}, 8), "a has dtype 'Q4'"),
        (header({"a": {**F32, "dtype": ["F32"]}}, 8), "a has dtype"),
        (header({"a": {**F32, "shape": [-2]}}, 8), r"a has shape \[-2\]"),
        (header({"a": {**F32, "shape": "2"}}, 8), "a has shape '2'"),
        (header({"a": {**F32, "shape": [True, 2]}}, 8), "a has shape"),
        (header({"a": {**F32, "data_offsets": [0]}}, 8), "data_offsets"),
        (header({"a": {**F32, "shape": [3]}}, 8), "a F32 .* requires 12 bytes"),
        (header({"a": {**F32, "data_offsets": [8, 0]}}, 8), "requires 8 bytes"),
        (header({"a": F32, "b": F32}, 8), "b overlaps a"),
        (header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, 20), "b leaves a gap after a"),
        (header({"a": {**F32, "data_offsets": [4, 12]}}, 12), "a leaves a gap after the header"),
        (header({"a": F32}, 7), r"truncated; a ends at byte \d+, the file at"),
        (header({"a": F32}, 9), "1 bytes follow the last tensor"),
    ],
)
def test_damaged_files(tmp_path, data, says):
    path = tmp_path / FILE
    path.write_bytes(data)
    with pytest.raises(WeightError, match=says) as caught:
        checkpoint.read_header(path)
    assert FILE in str(caught.value)


def test_unaligned_payload_is_read(tmp_path):
    text = json.dumps({"a": F32}).encode()
    text += b" " * (3 - len(text) % 8)
    (tmp_path / FILE).write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.5, -2.0))
    (stored,) = checkpoint.read_header(tmp_path / FILE).values()
    assert stored.start % 4
    ((_, tensor),) = checkpoint.map_tensors([stored])
    assert tensor.tolist() == [1.5, -2.0]


def test_empty_and_scalar_tensors(tmp_path):
    tensors = {"none": torch.zeros(0, 4), "one": torch.tensor(3.0)}
    checkpoint.save_tensors(tmp_path, tensors, torch.float32)
    found = {s.name: t for s, t in checkpoint.map_tensors(checkpoint.list_tensors(tmp_path).values())}
    assert found["none"].shape == (0, 4) and found["one"] == 3.0
    assert load_file(tmp_path / FILE)["one"] == 3.0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "last.ckpt"])
def test_pickles_are_never_opened(folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / FILE).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(WeightError, match=rf"{name}; pickle files can run code"):
        load_model(folder)
    assert not (tmp_path / "owned").exists()


def test_folders_without_weights(folder, tmp_path):
    (folder / FILE).unlink()
    with pytest.raises(WeightError, match=r"no model.safetensors.index.json and no model.safetensors"):
        check_folder(folder)
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "b.safetensors").write_bytes(b"")
    with pytest.raises(WeightError, match="2 safetensors files and no"):
        check_folder(folder)
    with pytest.raises(ConfigError, match="is not a folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is not a folder"):
        checkpoint.list_tensors(tmp_path / "nowhere")


def test_an_index_that_disagrees(folder):
    tensors = load_file(folder / FILE)
    checkpoint.save_tensors(folder, tensors, torch.float32, max_shard_bytes=3_000_000)
    index = json.loads((folder / checkpoint.INDEX).read_text())

    def refuses(weight_map: object, says: str) -> None:
        (folder / checkpoint.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightError, match=says):
            check_folder(folder)

    good = index["weight_map"]
    first = good[Q_PROJ]
    other = next(file for file in good.values() if file != first)
    refuses({}, "weight_map is missing")
    refuses({**good, Q_PROJ: other}, f"{first}: holds {Q_PROJ}, which .* places in '{other}'")
    refuses({n: f for n, f in good.items() if n != Q_PROJ}, f"holds {Q_PROJ}, which .* places in None")
    refuses({**good, "made.up": other}, f"made.up absent from {other}")
    for file in ("../model.safetensors", "/etc/passwd", "sub/a.safetensors", "model.bin", 3):
        refuses({**good, Q_PROJ: file}, f"{Q_PROJ} is in ")
    (folder / checkpoint.INDEX).write_bytes(b"[]")
    with pytest.raises(WeightError, match="a JSON list"):
        check_folder(folder)
    os.truncate(folder / checkpoint.INDEX, 101 << 20)
    with pytest.raises(WeightError, match=f"{100 << 20} are read"):
        check_folder(folder)
    (folder / other).unlink()
    refuses(good, f"{other}: no such file; .* places .* there")


def test_progress_ends_at_the_total(folder):
    seen: list[tuple[int, int]] = []
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.numel() for tensor in load_file(folder / FILE).values()) * 4
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_later_save_replaces_shards(folder):
    checkpoint.save_tensors(folder, load_file(folder / FILE), torch.float32, max_shard_bytes=1_500_000)
    model = tiny_keye_model(seed=5)
    save_model(model, folder)
    assert same_parameters(load_model(folder), model)


def test_registry(folder):
    family = family_of(folder)
    assert family.resolve("model") is KeyeModel and family.resolve("load_model") is load_model
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match=", ".join(FAMILIES)):
        family_of(folder)


# The published 8B checkpoint: real names and shapes, four shards, no payload.


def full_tensors() -> dict[str, tuple[int, ...]]:
    d, wide = 1152, 4304
    head = "visual.vision_model.head"
    unused = {
        "visual.vision_model.embeddings.packing_position_embedding.weight": (32768, d),
        f"{head}.probe": (1, 1, d),
        f"{head}.attention.in_proj_weight": (3 * d, d),
        f"{head}.attention.in_proj_bias": (3 * d,),
        f"{head}.attention.out_proj.weight": (d, d),
        f"{head}.attention.out_proj.bias": (d,),
        f"{head}.layernorm.weight": (d,),
        f"{head}.layernorm.bias": (d,),
        f"{head}.mlp.fc1.weight": (wide, d),
        f"{head}.mlp.fc1.bias": (wide,),
        f"{head}.mlp.fc2.weight": (d, wide),
        f"{head}.mlp.fc2.bias": (d,),
    }
    needed = {name: place.shape for name, place in places(KeyeConfig.from_dict(PREVIEW)).items()}
    return {**needed, **unused}


def write_sparse(folder: Path, tensors: dict[str, tuple[int, ...]]) -> list[Path]:
    """Four shards in bf16, their payload a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PREVIEW))
    names = list(tensors)
    quarter = -(-len(names) // 4)
    weight_map, files = {}, []
    for i in range(4):
        shard = {name: (torch.bfloat16, tensors[name]) for name in names[i * quarter : (i + 1) * quarter]}
        path = folder / f"model-{i + 1:05}-of-00004.safetensors"
        path.write_bytes(checkpoint.header_bytes(shard))
        payload = sum(torch.Size(shape).numel() * 2 for _, shape in shard.values())
        os.truncate(path, path.stat().st_size + payload)
        weight_map.update(dict.fromkeys(shard, path.name))
        files.append(path)
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def test_full_geometry(tmp_path):
    write_sparse(tmp_path / "8b", full_tensors())
    report = check_folder(tmp_path / "8b")
    assert report.num_parameters == 8_696_828_736
    assert report.num_bytes == 2 * 8_696_828_736
    assert len(report.files) == 4 and len(report.skipped) == 12
    assert report.num_parameters - report.num_loaded == 37_748_736 + 15_238_352
    with torch.device("meta"):
        model = KeyeModel(report.config)
    assert sum(p.numel() for p in model.parameters()) == report.num_loaded
    used = sum(f.stat().st_blocks * 512 for f in report.files)
    assert used < 10 << 20  # nothing was written


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "missing: model.layers.35.mlp.up_proj.weight"),
        ("extra", "extra: model.layers.36.mlp.up_proj.weight in model-0000"),
        ("misshapen", r"shape: model.layers.35.mlp.up_proj.weight in model-0000\d-of-00004.\w+ is \[4096, 12288\]"),
        ("truncated", r"model-00002-of-00004.safetensors: truncated; [\w.]+ ends at byte"),
    ],
)  # fmt: skip
def test_full_geometry_with_one_fault(tmp_path, fault, says):
    tensors = full_tensors()
    name = "model.layers.35.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["model.layers.36.mlp.up_proj.weight"] = (12288, 4096)
    elif fault == "misshapen":
        tensors[name] = (4096, 12288)
    files = write_sparse(tmp_path / "8b", tensors)
    if fault == "truncated":
        os.truncate(files[1], files[1].stat().st_size - 1)
    with pytest.raises(WeightError, match=says):
        check_folder(tmp_path / "8b")
