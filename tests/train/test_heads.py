"""Training of draft heads: draft steps are those of serving, runs resume to the same bits, bad recipes are refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvkeye.cli.answers import greedy_answers
from kvkeye.engine import LLM, SamplingParams
from kvkeye.errors import ConfigError
from kvkeye.layers import PackedContext
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.testing.tiny import tiny_keye_config
from kvkeye.train.checkpoint import save_state
from kvkeye.train.data import ChatEncoder, pack_single, questions_of
from kvkeye.train.heads.data import Sample, frequent_tokens, load_answers
from kvkeye.train.heads.recipe import load
from kvkeye.train.heads.trainer import HeadTrainer, run
from kvkeye.train.heads.unroll import unroll
from kvkeye.train.tokenizer import build_tokenizer
from tests.engine.test_bits_bundled import pytestmark as bundled

ENCODER = ChatEncoder(build_tokenizer())


def small_head(**sizes: int) -> DraftHead:
    torch.manual_seed(5)
    return DraftHead(HeadConfig.for_target(tiny_keye_config(num_layers=3).text, "0" * 64, (1, 2, 3), **sizes))


def test_draft_steps_are_those_of_decoding_a_branch() -> None:
    """Every row of every step against the head run token by token on its own states."""
    head = small_head()
    data = pack_single(questions_of("describe", 2, "train"), ENCODER)
    size = head.config.hidden_size
    features, embeds = torch.randn(len(data.ids), 3 * size), torch.randn(len(data.ids), size)
    for number, drafted in enumerate(unroll(head, features, embeds, data, 4)):
        for row in range(0, len(drafted.rows), 7):
            t = int(drafted.rows[row])
            first = int(data.cu_seqlens[data.cu_seqlens <= t].max())
            hidden = torch.cat([torch.zeros(1, size), head.fuse(features[first : t - number])])
            for end in range(t - number, t + 1):  # one row more per draft step
                positions, context = data.positions[:, first : end + 1], PackedContext.from_lengths([end + 1 - first])
                states = head(hidden, embeds[first : end + 1], positions, context)
                hidden = torch.cat([hidden, states[-1:]])
            torch.testing.assert_close(drafted.logits[row], head.logits(hidden[-1]), rtol=1e-4, atol=1e-4)


RECIPE = """
kind = "draft"
name = "head"
target = "tiny-keye"
steps = 4
depth = 3
save_every = 2
[head]
feature_layers = [1, 2, 4]
draft_vocab_size = 100
[data]
scenes = 3
kinds = { objects = 0.5, clip = 0.5 }
tasks = { describe = 1, color = 1 }
images = 2
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "draft.toml"
    path.write_text(f'output = "{folder / "out"}"\n{text}')
    return path


def unanswered(*_: object) -> Iterator[list[int] | None]:
    raise AssertionError("the answers are asked for once")


@bundled
def test_a_resumed_run_ends_in_the_same_bits_and_its_head_serves(tmp_path: Path) -> None:
    whole = run(write(tmp_path), greedy_answers)
    answers = load_answers(load(write(tmp_path)), unanswered)
    assert {sample.task for sample in answers} == {"describe", "color"}
    again = load(write(tmp_path), {"output": str(tmp_path / "again")})
    shutil.copytree(tmp_path / "out", again.output, ignore=shutil.ignore_patterns("state.pt", "head"))
    halted = HeadTrainer(again, answers)
    reports = [halted.train_step() for _ in range(2)]
    assert {"loss", "norm", "right/1", "right/2", "right/3"} == reports[0].keys()
    save_state(again.output, halted.state_dict())
    resumed = run(write(tmp_path), unanswered, {"output": str(again.output)})
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert files[0] == files[1]
    with LLM(str(again.target), speculation={"method": "eagle3", "model": str(whole)}, max_model_len=256) as llm:
        llm.generate("Describe", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))


@bundled
def test_the_head_learns(tmp_path: Path) -> None:
    recipe = load(write(tmp_path), {"steps": 30, "data.scenes": 1, "optimizer.lr": 3e-3, "optimizer.warmup": 1})
    trainer = HeadTrainer(recipe, load_answers(recipe, greedy_answers))
    losses = [trainer.train_step()["loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_most_frequent_tokens_are_kept() -> None:
    samples = [Sample("objects", 1, "describe", "?", answer) for answer in ([5, 5, 9, 2], [9, 5, 7])]
    assert frequent_tokens(samples, 3, end=1) == [1, 5, 9]
    assert frequent_tokens(samples, 12, end=1) == list(range(12))


REFUSED = [
    ("depth = 3", "depth = 0", "depth 0, steps 4; at least 1 each is required"),
    ("[head]", "[head]\nwidth = 3", "head: width unknown; known are feature_layers"),
    ("feature_layers = [1, 2, 4]", "feature_layers = [1, 2, 5]", "the target has 4 layers"),
    ("feature_layers = [1, 2, 4]", "feature_layers = [4, 2]", "required are three ascending numbers of layers"),
    ('target = "tiny-keye"', 'target = "nowhere"', "'nowhere' is not a folder"),
]


@bundled
@pytest.mark.parametrize("old, new, message", REFUSED)
def test_bad_recipes_are_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    recipe = write(tmp_path, RECIPE.replace(old, new))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").touch()
    with pytest.raises(ConfigError) as error:
        run(recipe, unanswered)
    assert message in str(error.value)
