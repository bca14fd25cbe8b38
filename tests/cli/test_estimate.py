"""`kvkeye estimate` against what loading, processing and serving really take."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image
from safetensors import safe_open

from kvkeye import LLM
from kvkeye.cli.sums import vision_bytes
from kvkeye.models.keye import KeyeProcessor
from kvkeye.models.keye.config import KeyeConfig
from tests.media.movies import greys, write_movie
from tests.models.test_config import PREVIEW, changed


@pytest.fixture
def estimate(call):
    def run(folder, *words):
        done = call("estimate", folder, "--json", *words)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return run


@pytest.fixture
def published(tmp_path):
    """A folder that holds nothing but the published config.json of an 8B checkpoint."""

    def write(version):
        data = PREVIEW
        if version == "1.5":
            data = changed(architectures=["KeyeVL1_5ForConditionalGeneration"], model_type="KeyeVL1_5", rope_theta=8e6)
        (tmp_path / "config.json").write_text(json.dumps(data))
        return tmp_path

    return write


def prompt_media(folder, **item):
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "?"}]}]
    (media,) = KeyeProcessor.from_folder(folder).process(messages).media
    return media


def test_published_numbers_from_config_alone(estimate, published):
    """36 layers, 8 heads of 128, keys and values, two bytes: 147,456 bytes per token."""
    found = estimate(published("preview"), "--ctx", "4096", "--seqs", "3")
    assert found["kv_bytes_per_token"] == 147_456
    assert found["kv_bytes"] == 3 * 4096 * 147_456
    assert found["weight_bytes"] == 2 * found["num_parameters"]
    assert found["dtype"] == "bfloat16" and found["version"] == "preview"


def test_dtype_scales_weights_and_cache(estimate, published):
    half, full = (estimate(published("1.5"), "--dtype", dtype) for dtype in ("bfloat16", "float32"))
    assert full["weight_bytes"] == 2 * half["weight_bytes"] and full["kv_bytes"] == 2 * half["kv_bytes"]


def test_weights_are_those_of_the_files(estimate, model):
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert estimate(model)["weight_bytes"] == total


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_cache_is_the_engines(estimate, model, kept):
    found = estimate(model, "--ctx", "1000", "--seqs", "2", "--kv-cache-dtype", kept)
    config = {"dtype": "float32", "max_model_len": 1000, "max_num_seqs": 2, "kv_cache_dtype": kept}
    with LLM(str(model), backends="attention=eager;kv_cache=eager;*=cpp", **config) as llm:
        runner = llm.engine.runner
        caches = (*runner.k_caches, *runner.v_caches, *runner.k_scales, *runner.v_scales)
        assert found["kv_bytes"] == sum(cache.nbytes for cache in caches)


@pytest.mark.parametrize("version", ["preview", "1.5"])
@pytest.mark.parametrize("size", [(640, 480), (1, 1), (3000, 2000), (29, 400), (2000, 100)])
def test_tokens_of_pictures_are_the_processors(estimate, model, model_1_5, size, version):
    folder = model if version == "preview" else model_1_5
    media = prompt_media(folder, type="image", image=Image.new("RGB", size, "green"))
    (found,) = estimate(folder, "--image", f"{size[0]}x{size[1]}")["media"]
    assert (found["tokens"], found["least_tokens"]) == (media.num_tokens, media.num_tokens)
    assert found["patches"] == len(media.pixel_values)


@pytest.mark.parametrize("size", [(96, 64), (640, 360)])
def test_tokens_of_preview_clips_are_the_processors(estimate, model, tmp_path, size):
    path = tmp_path / "clip.mp4"
    path.write_bytes(write_movie(greys(90, size[1], size[0]), fps=30))
    media = prompt_media(model, type="video", video=str(path), fps=2.0)
    (found,) = estimate(model, "--video", f"3@2:{size[0]}x{size[1]}")["media"]
    assert (found["frames"], found["tokens"]) == (media.grids[0][0], media.num_tokens)


def test_tokens_of_slow_fast_clips_are_bounded(estimate, model_1_5, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(write_movie(greys(90, 180, 320), fps=30))
    media = prompt_media(model_1_5, type="video", video=str(path), fps=2.0)
    (found,) = estimate(model_1_5, "--video", "3@2:320x180")["media"]
    assert found["frames"] == len(media.grids)
    assert found["least_tokens"] <= media.num_tokens <= found["tokens"]
    assert found["least_tokens"] < found["tokens"]


def test_what_one_pass_packs_decides_the_encoding(estimate, model):
    """4,096 patches of several requests share a pass; a picture above that is encoded alone."""
    vision = KeyeConfig.from_folder(model).vision
    small, large = ("--image", "56x56"), ("--image", "980x980")
    for words, patches in (
        (small, 16),
        ((*small, *small), 32),
        ((*small, "--seqs", "300"), 4096),
        (large, 4900),
        ((*small, *large, "--seqs", "4"), 4900),
    ):
        found = estimate(model, *words)
        assert found["vision_patches"] == patches
        assert found["vision_bytes"] == vision_bytes(vision, patches, 4)


def test_frames_of_a_1_5_clip_are_encoded_in_several_passes(estimate, model, model_1_5):
    words = ("--video", "60@2:1280x720")
    assert estimate(model_1_5, *words)["vision_patches"] == 4096
    joint = estimate(model, *words)
    assert joint["vision_patches"] == 4 * joint["media"][0]["tokens"] > 4096


def test_config_file_itself_is_accepted(estimate, published):
    folder = published("preview")
    by_file, by_folder = estimate(folder / "config.json"), estimate(folder)
    assert by_file | {"free_bytes": 0} == by_folder | {"free_bytes": 0}


def test_text_says_what_does_not_fit(call, published):
    out = call("estimate", published("preview"), "--video", "60@2:1280x720", "--seqs", "100000").out
    assert "does not fit" in out and "147,456 bytes per token" in out and "the context holds 32768" in out


def test_text_says_what_fits(call, model):
    assert ": fits" in call("estimate", model, "--ctx", "512").out


@pytest.mark.parametrize(
    "words",
    [
        ["--image", "1920"],
        ["--image", "0x0x0"],
        ["--image", "1920x1"],
        ["--image", "0x5"],
        ["--video", "60:1280x720"],
        ["--video", "0@2:1280x720"],
        ["--video", "60@0:1280x720"],
        ["--ctx", "0"],
        ["--ctx", "1000000"],
        ["--seqs", "-1"],
        ["--dtype", "int8"],
    ],
)
def test_unusable_sizes(call, published, words):
    done = call("estimate", published("preview"), *words)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err


def test_unusable_model(call, published, tmp_path):
    folder = published("preview")
    (folder / "config.json").write_text(json.dumps(changed(head_dim=...)))
    done = call("estimate", folder)
    assert done.code == 4 and "head_dim" in done.err


def test_nothing_but_json_is_read(estimate, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    assert estimate(folder)["weight_bytes"] == estimate(model)["weight_bytes"]
