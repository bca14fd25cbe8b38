"""The bundled tiny-t2v and tiny-i2v: small, complete, and as good on a fresh sample as their cards say."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from kvkeye.train.clips.evaluate import evaluate

ASSETS = Path(str(files("kvkeye"))) / "assets"
NAMES = ("tiny-t2v", "tiny-i2v")
SAMPLE = 24
pytestmark = pytest.mark.skipif(
    not all((ASSETS / name).is_dir() for name in NAMES), reason="no bundled video pipelines yet"
)


def test_layout_and_size():
    total = 0
    for name in NAMES:
        paths = {str(path.relative_to(ASSETS / name)) for path in (ASSETS / name).rglob("*") if path.is_file()}
        assert paths >= {
            "README.md", "scores.json", "model_index.json", "video_defaults.json", "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors", "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
            "tokenizer/tokenizer.json", "scheduler/scheduler_config.json",
        }  # fmt: skip
        total += sum((ASSETS / name / path).stat().st_size for path in paths)
    assert total <= 10e6


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_sample_scores_as_the_card_says(name):
    """Prompts that no run has scored: their seed is the test's own. Two standard deviations of a sample are allowed."""
    card = json.loads((ASSETS / name / "scores.json").read_text())[name]
    found = evaluate(ASSETS / name, SAMPLE, seed=77)[name]
    for word in ("color_right", "shape_right", "speed_right", "direction_right", "all_right"):
        spread = max((card[word] * (1 - card[word]) / SAMPLE) ** 0.5, 1 / SAMPLE)
        assert getattr(found, word) >= card[word] - 2 * spread, word
    assert found.presence >= card["presence"] - 0.05 and found.color <= card["color"] + 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_card_states_the_measured_scores(name):
    scores = json.loads((ASSETS / name / "scores.json").read_text())
    text = (ASSETS / name / "README.md").read_text()
    for what, found in scores.items():
        assert found["clips"] >= 150
        assert f"| {what} | {100 * found['color_right']:.1f} | {100 * found['shape_right']:.1f} |" in text
