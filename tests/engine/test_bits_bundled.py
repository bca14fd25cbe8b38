"""The same bits on the bundled, trained tiny-keye: real pictures through the processor, answers of 64 tokens."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import kvkeye
from kvkeye.engine import Engine, EngineConfig
from kvkeye.engine.config import DTYPES
from tests.engine.logits import logits_of, preempt_often

FOLDER = next(iter(kvkeye.__path__)) + "/assets/tiny-keye"
pytestmark = pytest.mark.skipif(
    not Path(FOLDER, "model.safetensors").is_file(),
    reason="the package holds no trained tiny-keye; `kvkeye train sft.toml` makes one. tests/engine/test_bits.py holds "
    "the same promise on random weights",
)
QUESTIONS = ["What colour is the shape?", "Describe the picture.", "How many objects are there?", "Read the text."]


def scene(seed):
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (int(rng.integers(56, 160)), int(rng.integers(56, 160))), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y, size = rng.integers(0, 60), rng.integers(0, 60), rng.integers(10, 40)
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def conversation(i):
    media = [{"type": "image", "image": scene(i % 3)}] if i % 4 else []
    return [{"role": "user", "content": [*media, {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}]}]


@functools.cache
def loaded(dtype):
    return Engine.from_config(EngineConfig(model=FOLDER, dtype=dtype, max_model_len=1024, num_blocks=32))


def served_by(dtype, **config):
    base = loaded(dtype)
    values = {"model": FOLDER, "max_model_len": 1024, "backends": "cpp"} | config
    return Engine(EngineConfig(**values), base.runner.model, base.processor)


def prompts(dtype, count):
    prepare = loaded(dtype).prepare
    return {str(i): functools.partial(prepare, conversation(i)) for i in range(count)}


@functools.cache
def alone(dtype, name):
    served = served_by(dtype, enable_prefix_cache=False, encoder_cache_memory=0)
    return logits_of(served, {name: prompts(dtype, int(name) + 1)[name]})[name]


CASES = {
    "a batch of 16": ({}, {}, 16),
    "chunks of 1": ({"max_prefill_chunk": 1}, {}, 4),
    "chunks of 7": ({"max_prefill_chunk": 7}, {}, 6),
    "chunks of 64": ({"max_prefill_chunk": 64}, {}, 6),
    "cached prefixes": ({}, {"rounds": 2}, 6),
    "preemption": ({"max_prefill_chunk": 33, "num_blocks": 32}, {"interrupt": preempt_often}, 6),
}


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float16"])
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_the_request_alone(case, dtype):
    config, how, count = CASES[case]
    served = served_by(dtype, **config)
    for name, logits in logits_of(served, prompts(dtype, count), **how).items():
        assert torch.equal(logits, alone(dtype, name)), name
    stats = served.stats()
    assert case != "cached prefixes" or stats.num_cached_tokens > 0
    assert case != "preemption" or stats.num_preemptions > 5
