"""`kvkeye demo`: fresh scenes, repeated by their seed, asked and scored."""

from __future__ import annotations

import re

import av
import pytest
from PIL import Image

from kvkeye.cli import bundled, drawings
from kvkeye.cli.drawings import draw
from kvkeye.train.questions import score
from kvkeye.utils.assets import ASSETS

SEED = 5
SHORT = ("--max-tokens", "6", "--video", "0")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw(SEED, 3, 2, tmp_path_factory.mktemp("drawn"))


def lines(text, name):
    return re.findall(rf"^  {name} +(.*)$", text, re.MULTILINE)


def test_asks_what_was_drawn(call, model, drawn, tmp_path):
    done = call("demo", model, "--seed", SEED, "--pictures", "3", "--clips", "2", "--out", tmp_path, *SHORT)
    assert done.code == 0, done.err
    assert done.out.startswith(f"seed {SEED}; pictures in {tmp_path}\n")
    turns = [turn for drawing in drawn for turn in drawing.turns]
    assert lines(done.out, "question") == [turn.question for turn in turns]
    assert lines(done.out, "expected") == [turn.answer for turn in turns]
    correct, total = re.search(r"^correct (\d+)/(\d+)$", done.out, re.MULTILINE).groups()
    assert (int(correct), int(total)) == (len(lines(done.out, "right")), len(turns))
    assert re.search(r"^\d+ steps, \d+ prompt tokens of which \d+ came from the cache", done.out, re.MULTILINE)


def test_files_are_what_the_messages_show(drawn):
    pictures, clips = drawn[:3], drawn[3:]
    for drawing in pictures:
        with Image.open(drawing.item["image"]) as picture:
            assert picture.mode == "RGB" and f"{picture.width}x{picture.height}" in drawing.title
    for drawing in clips:
        assert len(drawing.item["video"]) >= 4 and drawing.item["fps"] == 2.0
        frames = [Image.open(path).tobytes() for path in drawing.item["video"]]
        assert len(set(frames)) == len(frames), "something must move"


def test_every_picture_and_clip_has_questions_with_answers(drawn):
    assert all(drawing.turns for drawing in drawn)
    assert {"motion"} <= {turn.task for drawing in drawn[3:] for turn in drawing.turns}
    assert all(score(turn, turn.answer) == 1.0 for drawing in drawn for turn in drawing.turns)


def test_seed_repeats_the_scenes(drawn, tmp_path):
    again = draw(SEED, 3, 2, tmp_path / "again")
    other = draw(SEED + 1, 3, 2, tmp_path / "other")
    assert [drawing.turns for drawing in again] == [drawing.turns for drawing in drawn]
    assert [drawing.turns for drawing in other] != [drawing.turns for drawing in drawn]
    with Image.open(again[0].item["image"]) as one, Image.open(drawn[0].item["image"]) as two:
        assert one.tobytes() == two.tobytes()


def test_random_seed_is_printed(call, model):
    first, second = (call("demo", model, "--pictures", "1", "--clips", "0", *SHORT) for _ in range(2))
    seeds = [re.match(r"seed (\d+); pictures in (\S+)\n", done.out).groups() for done in (first, second)]
    assert first.code == second.code == 0
    assert seeds[0][0] != seeds[1][0] and seeds[0][1] != seeds[1][1]


def test_without_fonts_only_shapes_are_drawn(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(drawings, "font_folder", lambda: None)
    found = draw(SEED, 3, 0, tmp_path)
    assert len(found) == 3 and {turn.task for d in found for turn in d.turns} <= set(drawings.TASKS["objects"])
    assert "matplotlib" in caplog.text


@pytest.mark.parametrize("words", [["--pictures", "0", "--clips", "0"], ["--pictures", "-1"]])
def test_nothing_to_draw(call, model, words):
    done = call("demo", model, *words)
    assert done.code == 2 and done.out == ""


@pytest.mark.skipif(
    not (ASSETS / bundled.DEFAULT_MODEL).is_dir(), reason="the bundled tiny-keye has not been trained yet"
)
def test_bundled_model_answers_most_questions(call, tmp_path):
    done = call("demo", "--seed", SEED, "--pictures", "6", "--clips", "3", "--video", "0", "--out", tmp_path)
    assert done.code == 0, done.err
    correct, total = map(int, re.search(r"^correct (\d+)/(\d+)$", done.out, re.MULTILINE).groups())
    assert correct >= 0.7 * total, done.out


@pytest.mark.skipif(
    not all((ASSETS / name).is_dir() for name in bundled.PIPELINES), reason="no bundled video pipelines yet"
)
def test_ends_with_a_long_clip_of_each_method(call, model, tmp_path):
    words = ("--pictures", "1", "--clips", "0", "--max-tokens", "6", "--video", "4", "--out", tmp_path, "--seed", SEED)
    done = call("demo", model, *words)
    assert done.code == 0, done.err
    for method in ("videomerge", "kstep"):
        clip, report = tmp_path / f"{method}.mp4", tmp_path / method / "report.png"
        assert f"{clip}\n" in done.out and f"{report}\n" in done.out and report.stat().st_size > 10_000
        with av.open(str(clip)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 33 and (frames[0] != frames[-1]).any()
    prompt = re.search(r'^  "(a .* moves .*)"$', done.out, re.MULTILINE).group(1)
    assert done.out.count(f'"{prompt}"') == 2, "both methods show the same motion"
