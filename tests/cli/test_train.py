"""`kvkeye train`: a short run of a small recipe gives a checkpoint that `kvkeye run` answers with."""

from __future__ import annotations

import pytest

from kvkeye.cli.train import RECIPES, recipe_path
from kvkeye.train.__main__ import main as score
from tests.train.tiny import write_recipe


def test_trained_folder_is_printed_and_loads(call, tmp_path):
    done = call("train", write_recipe(tmp_path, steps=3), "report_every=1", f"output={tmp_path / 'elsewhere'}")
    assert done.code == 0, done.err
    folder = tmp_path / "elsewhere" / "small"
    assert done.out == f"{folder}\n" and not (tmp_path / "out").exists()
    assert "step 1/3" in done.err and "step 3/3" in done.err
    answered = call("run", folder, "Hello.", "--max-tokens", "4")
    assert answered.code == 0, answered.err


def test_bundled_recipes_go_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe_path("sft.toml") == RECIPES / "sft.toml"
    (tmp_path / "sft.toml").write_text("")
    assert recipe_path("sft.toml").samefile(tmp_path / "sft.toml")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["gone.toml"], ["'gone.toml'", "sft.toml"]),
        (["sft.toml", "steps"], ["'steps'", "name=value"]),
        (["sft.toml", "speed=9"], ["speed", "known are"]),
        (["KIND"], ["kind is 'clips'", "'draft' or 'video'"]),
    ],
)
def test_unusable_recipes(call, words, parts, tmp_path):
    (tmp_path / "kind.toml").write_text('kind = "clips"\n')
    done = call("train", *(tmp_path / "kind.toml" if word == "KIND" else word for word in words))
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert all(part in done.err for part in parts), done.err


@pytest.mark.parametrize("words", [[], ["video.toml"], ["evaluate"]])
def test_the_module_scores_and_names_the_command_that_trains(words):
    with pytest.raises(SystemExit, match="`kvkeye train RECIPE` trains"):
        score(words)
