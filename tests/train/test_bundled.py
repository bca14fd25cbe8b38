"""The bundled tiny-keye: small, complete, and as good on a fresh sample as its card says."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from kvkeye.models.keye.processor import load_tokenizer
from kvkeye.models.keye.weights import check_folder, load_model
from kvkeye.train.data import ChatEncoder
from kvkeye.train.evaluate import evaluate
from kvkeye.train.fonts import font_folder
from kvkeye.train.tokenizer import build_tokenizer

FOLDER = Path(str(files("kvkeye"))) / "assets" / "tiny-keye"
pytestmark = pytest.mark.skipif(not (FOLDER / "model.safetensors").is_file(), reason="no bundled checkpoint yet")
#: Task -> what the sample of 60 must reach: a few points under the full score, for chance.
LEAST = {"color": 0.82, "shape": 0.82, "count": 0.80, "position": 0.80, "motion": 0.80, "background": 0.9}
LEAST_TEXT = {"word": 0.62}


def test_layout_and_size() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "tokenizer.json",
        "tokenizer_config.json", "model.safetensors", "README.md", "scores.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
    check_folder(FOLDER)
    config = json.loads((FOLDER / "config.json").read_text())
    vision = config["vision_config"]
    assert config["head_dim"] == 128 and vision["hidden_size"] // vision["num_attention_heads"] == 72
    assert load_tokenizer(FOLDER).to_str() == build_tokenizer().to_str()


@pytest.mark.parametrize("task", [*LEAST, *LEAST_TEXT])
def test_a_fresh_sample_scores_as_the_card_says(task: str) -> None:
    """Questions that no run has evaluated: their seed is the test's own."""
    if task in LEAST_TEXT and font_folder() is None:
        pytest.skip("the fonts of the train extra (matplotlib) are absent")
    model = load_model(FOLDER, torch.float32, "cpu")
    (result,) = evaluate(model, ChatEncoder(load_tokenizer(FOLDER)), "held_out", 60, (task,), seed=77)
    assert result.accuracy >= {**LEAST, **LEAST_TEXT}[task]


def test_the_card_states_the_measured_scores() -> None:
    card = (FOLDER / "README.md").read_text()
    for entry in json.loads((FOLDER / "scores.json").read_text()):
        assert entry["questions"] >= 500
        assert f"| {entry['task']} | {entry['split']} | {entry['questions']} | {100 * entry['accuracy']:.1f} |" in card
