"""The loop: resumes to the same bits, learns, averages over processes, refuses bad recipes by name."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch

from kvkeye.errors import ConfigError
from kvkeye.models.keye.weights import load_model
from kvkeye.train import checkpoint, run
from kvkeye.train.data import ChatEncoder, pack_single, questions_of
from kvkeye.train.evaluate import evaluate, exact_turns, greedy, table
from kvkeye.train.losses import answer_logits
from kvkeye.train.optimizer import orthogonalise, rate
from kvkeye.train.recipe import Optimizer, load, parse_overrides
from kvkeye.train.tokenizer import build_tokenizer
from kvkeye.train.trainer import Trainer, batches
from tests.train.tiny import small_model, write_recipe

ENCODER = ChatEncoder(build_tokenizer())


def equal_states(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[k], b[k]) for k in a)  # type: ignore[attr-defined, index]
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_states(x, y) for x, y in zip(a, b))  # type: ignore[arg-type]
    return a == b


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(write_recipe(tmp_path / "a", steps=6, save_every=3))
    recipe = write_recipe(tmp_path / "b", steps=6, save_every=3)
    halted = Trainer(load(recipe))
    source = batches(halted.recipe, 0)
    for data, _ in zip(source, range(3)):
        halted.train_step(data)
    source.close()
    checkpoint.save_state(halted.recipe.output, halted.state_dict())
    with caplog.at_level(logging.INFO, "kvkeye.train"):
        resumed = run(recipe)
    assert "resumed small at step 3 of 6" in caplog.text and "samples/s" in caplog.text
    states = [checkpoint.load_state(folder.parent) for folder in (whole, resumed)]
    assert states[0] is not None and equal_states(*states)
    files = [(folder / "model.safetensors").read_bytes() for folder in (whole, resumed)]
    assert files[0] == files[1]


def test_the_exported_folder_loads_with_the_averaged_weights(tmp_path: Path) -> None:
    folder = run(write_recipe(tmp_path, steps=3))
    state = checkpoint.load_state(tmp_path / "out")
    assert state is not None
    loaded = load_model(folder, torch.bfloat16, "cpu")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state["average"][name].to(torch.bfloat16)), name


def test_two_processes_step_by_the_mean_over_all_tokens(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, steps=3, save_every=3)
    run(recipe, {"processes": 2})
    state = checkpoint.load_state(tmp_path / "out")
    alone = Trainer(load(recipe))
    sources = [batches(alone.recipe, 0, rank) for rank in (0, 1)]
    for pair in zip(*sources):
        for data in pair:
            alone.loss_of(data, share=2 * len(data.targets) / sum(len(d.targets) for d in pair))[0].backward()
        for _, parameter in alone.named:
            if parameter.grad is not None:
                parameter.grad /= 2
        alone.update()
    assert state is not None and state["step"] == alone.step
    for name, parameter in alone.model.state_dict().items():
        torch.testing.assert_close(state["model"][name], parameter, rtol=1e-3, atol=1e-5)


def test_a_small_model_learns_a_constant() -> None:
    model = small_model()
    items = questions_of("motion", 8, "train")
    data = pack_single(items, ENCODER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        logits = answer_logits(model, data)[0]
        loss = torch.nn.functional.cross_entropy(logits, data.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    model = small_model()
    items = questions_of("count", 3, "train")
    data = pack_single(items, ENCODER)
    logits = torch.full((len(data.targets), model.config.text.vocab_size), 0.0)
    logits[torch.arange(len(data.targets)), data.targets] = 1.0
    assert exact_turns(logits, data) == [True] * 3
    logits[1] = -logits[1]  # the end of the first answer
    assert exact_turns(logits, data) == [False, True, True]
    own = greedy(model, ENCODER, items[0])
    if own:  # what the model writes by itself is right under teacher forcing too
        scene, turn = items[0]
        said = type(turn)(turn.task, turn.question, own)
        written = pack_single([(scene, said)], ENCODER)
        picks = answer_logits(model, written)[0].argmax(1)
        assert picks[0] == written.targets[0]


def test_scores_of_an_untrained_model_are_at_chance() -> None:
    scores = evaluate(small_model(), ENCODER, count=6, tasks=("color", "motion"), blind=True)
    assert [s.task for s in scores] == ["color", "motion"] and all(s.accuracy <= 0.5 for s in scores)
    assert table(scores).count("\n") == 3


def test_the_rate_warms_up_stays_and_falls() -> None:
    settings = Optimizer(warmup=10, decay=20)
    rates = [rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == [1.0] * 71
    assert all(a >= b for a, b in itertools.pairwise(rates[80:])) and rates[-1] < 0.05


@pytest.mark.parametrize("shape", [(24, 24), (72, 24), (24, 72)])
def test_orthogonalised_updates_have_even_singular_values(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.4
    assert math.isclose(values.mean(), 1.0, abs_tol=0.25)


def test_overrides_reach_nested_entries(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path), parse_overrides(["steps=12", "optimizer.lr=1e-4", "output=elsewhere"]))
    assert (recipe.steps, recipe.optimizer.lr, recipe.output) == (12, 1e-4, Path("elsewhere"))
    assert recipe.stage(1).answers is False and recipe.stage(2).answers is True


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("optimizer.speed=1", "speed unknown"),
        ("model_size=3", "model_size unknown"),
        ("kind=video", "kind is 'video'.*`kvkeye train FILE`"),
        ("stages=[]", "start = 0"),
        ("stages=[{start = 5}]", "start = 0"),
        ("stages=[{start = 0, colour = 1}]", "colour unknown"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(tmp_path: Path, override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(write_recipe(tmp_path), parse_overrides([override]))


def test_a_missing_recipe_and_a_bad_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        load(tmp_path / "no_such.toml")
    with pytest.raises(ConfigError, match="name=value"):
        parse_overrides(["steps"])


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / checkpoint.STATE)
    with pytest.raises(ConfigError, match="no training state"):
        checkpoint.load_state(tmp_path)
