"""`kvkeye bench latency`: both ways of decoding, the same answers, and their times."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.engine.test_bits_bundled import pytestmark as bundled

WORDS = ["--output-tokens", "12", "--rounds", "2"]


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (90, 70), "orange").save(path)
    return path


def test_both_sides_in_json(call, model, picture):
    done = call("bench", "latency", model, "--image", picture, "--batch", "2", "--json", *WORDS)
    assert done.code == 0
    result = json.loads(done.out)
    assert (result["benchmark"], result["batch"], result["output_tokens"]) == ("latency", 2, 12)
    assert result["prompt_tokens"] > 12
    for side in ("plain", "speculative"):
        times = result[side]
        assert 0 < times["prefill_ms"] <= times["ttft_ms"]
        assert 0 < times["ms_per_token"] <= times["ms_per_token_slowest"]
    assert result["plain"]["speculation"] is None
    speculation = result["speculative"]["speculation"]
    if speculation is not None:  # None without the C++ kernels
        # All 12 tokens where the prompt's own pass checked proposals, which depends on what steps took.
        assert speculation["num_decode_steps"] + speculation["num_accepted_tokens"] in (11, 12)


def test_text_and_one_side(call, model):
    done = call("bench", "latency", model, "--question", "la la la la la la la", "--sides", "speculative", *WORDS)
    assert done.code == 0
    assert "12 tokens), 2 rounds" in done.out and "ms per token" in done.out and "plain" not in done.out


@bundled
def test_a_draft_head(call, model, picture):
    words = ["--image", picture, "--question", "Describe the picture.", "--draft-head", "tiny-keye-eagle3", *WORDS]
    done = call("bench", "latency", *words)
    assert done.code == 0 and "tokens per step" in done.out and "proposals accepted (by position" in done.out
    done = call("bench", "latency", model, *words)
    assert done.code == 4 and "tiny-keye-eagle3" in done.err


def test_refusals(call, model, tmp_path):
    assert call("bench", "latency", model, "--image", tmp_path / "none.png").code == 2
    assert call("bench", "latency", tmp_path).code != 0
    done = call("bench", "latency", model, "--temperature", "9", *WORDS)
    assert done.code == 2 and "temperature" in done.err
