"""`kvkeye run`: the engine's own answer on stdout, statistics on stderr, JSON on demand."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from kvkeye import LLM, SamplingParams
from kvkeye.cli.terminal import printable
from kvkeye.models.keye import KeyeProcessor
from tests.media.movies import greys, write_movie
from tests.samples import photo

GREEDY = ("--temperature", "0", "--max-tokens", "12", "--dtype", "float32")


@pytest.fixture(scope="module")
def llm(model):
    with LLM(str(model), dtype="float32", max_num_seqs=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two photographs, small enough to be quick."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, size in (("coffee.png", (150, 100)), ("astronaut.png", (90, 140))):
        with Image.open(photo(name)) as picture:
            paths.append(folder / name)
            picture.convert("RGB").resize(size).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    path = tmp_path_factory.mktemp("movies") / "clip.mp4"
    path.write_bytes(write_movie(greys(30), fps=10))
    return path


def answer(llm, *content, **sampling):
    messages = [{"role": "user", "content": list(content)}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=12, **sampling))
    return output


def test_answer_is_the_engines(call, llm, model, pictures):
    expected = answer(
        llm, {"type": "image", "image": str(pictures[0])}, {"type": "text", "text": "What is in the picture?"}
    )
    done = call("run", model, "--image", pictures[0], "What is in the picture?", *GREEDY)
    assert done.code == 0
    assert done.out.rstrip("\n") == printable(expected.outputs[0].text).rstrip("\n")


def test_statistics_are_the_last_line(call, model, pictures):
    done = call("run", model, "--image", pictures[0], "What?", *GREEDY)
    last = done.err.splitlines()[-1]
    found = re.fullmatch(
        r"prompt (\d+) tokens \(0 cached\), answer (\d+) \| media \d+ ms, vision \d+ ms, prefill \d+ ms, "
        r"decode \d+ ms, [\d.]+ tokens/s"
        r"( \| [\d.]+ tokens per step, \d+ of \d+ proposals accepted \(by position [\d% ]+\), about -?\d+ ms saved)?",
        last,
    )
    assert found is not None, last
    processed = KeyeProcessor.from_folder(model).process(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(pictures[0])}, {"type": "text", "text": "What?"}],
            }
        ]
    )
    assert int(found[1]) == len(processed.token_ids)


def test_stages_are_shown_one_after_the_other(call, model, pictures, monkeypatch):
    """Vision has ended when prefill begins, and prefill when the answer begins."""
    events = []

    @contextmanager
    def recorded(label):
        events.append(label)
        yield
        events.append(f"end of {label}")

    monkeypatch.setattr("kvkeye.cli.session.stage", recorded)
    done = call("run", model, "--image", pictures[0], "What?", *GREEDY)
    assert done.code == 0
    stages = [re.sub(r"\d+", "N", event) for event in events if "loading" not in event]
    names = ("pictures and prompt", "vision of N patches", "prefill of N tokens")
    assert stages == [event for name in names for event in (name, f"end of {name}")]


def test_json_holds_the_same_answer(call, llm, model, pictures, movie):
    """Several pictures and a clip, in the order in which they were given."""
    items = [
        {"type": "image", "image": str(pictures[1])},
        {"type": "video", "video": str(movie), "fps": 2.0},
        {"type": "image", "image": str(pictures[0])},
        {"type": "text", "text": "Compare."},
    ]
    expected = answer(llm, *items)
    words = ["--image", pictures[1], "--video", movie, "Compare.", "--image", pictures[0], "--fps", "2", "--json"]
    done = call("run", model, *words, *GREEDY)
    assert done.code == 0
    result = json.loads(done.out)
    assert result["token_ids"] == expected.outputs[0].token_ids
    assert result["answer"] == expected.outputs[0].text
    assert result["statistics"]["num_prompt_tokens"] == len(expected.prompt_token_ids)
    assert (result["model"], result["question"]) == (str(model), "Compare.")
    assert result["finish_reason"] == expected.outputs[0].finish_reason


def test_order_of_media_matters(call, model, pictures):
    first = call("run", model, "--image", pictures[0], "--image", pictures[1], "Which?", "--json", *GREEDY)
    second = call("run", model, "--image", pictures[1], "--image", pictures[0], "Which?", "--json", *GREEDY)
    assert json.loads(first.out)["token_ids"] != json.loads(second.out)["token_ids"]


def test_folder_of_frames_is_a_clip(call, llm, model, tmp_path):
    for k, level in enumerate((10, 90, 170, 250)):
        Image.fromarray(np.full((60, 80, 3), level, np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    paths = [str(tmp_path / f"{k}.png") for k in range(4)]
    expected = answer(llm, {"type": "video", "video": paths}, {"type": "text", "text": "What moves?"})
    done = call("run", model, "--video", tmp_path, "What moves?", "--json", *GREEDY)
    assert json.loads(done.out)["token_ids"] == expected.outputs[0].token_ids


def test_folder_without_frames(call, model, tmp_path):
    done = call("run", model, "--video", tmp_path, "What moves?")
    assert done.code == 2 and str(tmp_path) in done.err


def test_mode_reaches_the_prompt(call, model):
    """The tiny tokenizer spells text byte by byte, so the suffix is as many tokens as characters."""

    def prompt_tokens(*words):
        return json.loads(call("run", model, "What?", "--json", *GREEDY, *words).out)["statistics"]["num_prompt_tokens"]

    plain = prompt_tokens()
    assert prompt_tokens("--mode", "auto") == plain
    assert prompt_tokens("--mode", "think") == plain + len("/think")
    assert prompt_tokens("--mode", "no_think") == plain + len("/no_think")


def test_seed_repeats_an_answer(call, model):
    def tokens(seed):
        words = ["--json", "--temperature", "1.5", "--max-tokens", "12", "--seed", seed]
        return json.loads(call("run", model, "Tell me.", *words).out)["token_ids"]

    assert tokens(7) == tokens(7) != tokens(8)


def test_sampling_defaults_are_the_checkpoints(call, model, tmp_path):
    """Greedy in generation_config.json, nothing on the command line: any two seeds agree."""
    folder = shutil.copytree(model, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False}))

    def tokens(seed):
        words = ["--json", "--max-tokens", "12", "--dtype", "float32", "--seed", seed]
        return json.loads(call("run", folder, "Tell me.", *words).out)["token_ids"]

    assert tokens(1) == tokens(2) == json.loads(call("run", model, "Tell me.", "--json", *GREEDY).out)["token_ids"]


def test_one_pixel_is_answered(call, model, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    done = call("run", model, "--image", tmp_path / "one.png", "What color?", *GREEDY)
    assert done.code == 0 and done.out


def test_eager_backend_gives_the_same_answer(call, model, pictures):
    words = ["--image", pictures[0], "What?", "--json", *GREEDY]
    default, eager = (call("run", model, *words, *more) for more in ((), ("--backends", "eager")))
    assert json.loads(default.out)["token_ids"] == json.loads(eager.out)["token_ids"]


def test_in_its_own_process(spawn, llm, model, pictures):
    expected = answer(llm, {"type": "image", "image": str(pictures[0])}, {"type": "text", "text": "What?"})
    done = spawn("run", model, "--image", pictures[0], "What?", *GREEDY)
    assert done.returncode == 0 and "prompt " in done.stderr
    assert done.stdout.rstrip("\n") == printable(expected.outputs[0].text).rstrip("\n")
