"""Scenes: pure functions of their seed, splits that cannot meet, answers that follow from the specification."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest

from kvkeye.train import questions, scenes
from kvkeye.train.fonts import HELD_OUT_FONTS, PILLOW_FONT, TRAIN_FONTS, font_folder
from kvkeye.train.questions import TASKS, Turn, ask, facts, score
from kvkeye.train.render import LABEL_SIZES, patch_labels, render
from kvkeye.train.scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Kind, Scene, sample_scene
from kvkeye.train.words import WORDS

KINDS: tuple[Kind, ...] = ("objects", "text", "mixed", "clip")
needs_fonts = pytest.mark.skipif(font_folder() is None, reason="the fonts of the train extra (matplotlib) are absent")


def pictures(count: int, split: scenes.Split = "train") -> list[Scene]:
    kinds: tuple[Kind, ...] = KINDS if font_folder() is not None else ("objects", "clip")
    return [sample_scene(seed, kinds[seed % len(kinds)], split) for seed in range(count)]


def test_what_the_issue_asks_of_the_scenes() -> None:
    assert len(COLORS) >= 8 and len(SHAPES) >= 6 and len(POSITIONS) == 9
    assert len(set(WORDS)) == len(WORDS) >= 300
    assert not set(TRAIN_FONTS) & set(HELD_OUT_FONTS) and PILLOW_FONT in TRAIN_FONTS
    seen = pictures(200)
    assert {len(s.things) for s in seen if s.kind == "objects"} == {1, 2, 3, 4, 5}
    assert {s.direction for s in seen if s.kind == "clip"} == set(scenes.DIRECTIONS)
    assert all(4 <= s.frames <= 8 for s in seen if s.kind == "clip")


def test_a_seed_gives_the_same_pixels() -> None:
    for scene, again in zip(pictures(12), pictures(12)):
        assert scene == again and scene.digest() == again.digest()
        for a, b in zip(render(scene), render(again), strict=True):
            assert a.size == (scene.width, scene.height) and a.tobytes() == b.tobytes()


def test_splits_are_disjoint_by_hash() -> None:
    reserved = {split: {int(s.digest()[:2], 16) < 26 for s in pictures(80, split)} for split in ("train", "held_out")}
    assert reserved == {"train": {False}, "held_out": {True}}


@needs_fonts
def test_shifted_scenes_show_fonts_and_sizes_that_training_never_does() -> None:
    for scene in pictures(80, "shifted"):
        assert scenes.is_shifted_size(scene.width, scene.height)
        assert scene.text is None or (scene.text.font in HELD_OUT_FONTS and scene.text.size in (27, 31))
    for scene in pictures(80):
        assert not scenes.is_shifted_size(scene.width, scene.height)
        assert scene.text is None or (scene.text.font in TRAIN_FONTS and scene.text.size not in (27, 31))


def test_things_stand_where_their_names_say() -> None:
    for scene in pictures(60):
        for thing in scene.things if scene.kind != "clip" else ():
            column, row = int(3 * thing.x / scene.width), int(3 * thing.y / scene.height)
            assert thing.position == POSITIONS[3 * row + column]
            pixel = render(scene)[0].getpixel((round(thing.x), round(thing.y)))
            assert np.abs(np.subtract(pixel, thing.rgb)).max() <= 2, "the middle of a thing has its colour"


def test_the_mover_moves_the_named_way_and_stays_inside() -> None:
    for seed in range(40):
        scene = sample_scene(seed, "clip")
        first, last = scene.things[0], scene.at_frame(scene.frames - 1).things[0]
        dx, dy = scenes.DIRECTIONS[str(scene.direction)]
        moved = (last.x - first.x) * dx + (last.y - first.y) * dy
        assert moved > 0.3 * (scene.width if dx else scene.height)
        for thing in (first, last):
            assert thing.radius - 1 <= thing.x <= scene.width - thing.radius + 1
            assert thing.radius - 1 <= thing.y <= scene.height - thing.radius + 1


def test_answers_follow_from_the_scene() -> None:
    rng = random.Random(0)
    asked: Counter[str] = Counter()
    for scene in pictures(120):
        for task in TASKS:
            turn = ask(scene, task, rng)
            if turn is None:
                continue
            asked[task] += 1
            _check(scene, turn)
    expected = set(TASKS) if font_folder() is not None else set(TASKS) - {"word", "digits", "copy"}
    assert set(asked) == expected


def _check(scene: Scene, turn: Turn) -> None:
    """Finds the answer again by looking for the things that the question names."""
    text = turn.question
    things = [
        t for t in scene.things
        if all(name not in text or name == value for names, value in
               ((COLORS, t.color), (SHAPES, t.shape)) for name in names)
    ]  # fmt: skip
    at = sorted((p for p in POSITIONS if f"at the {p}" in text), key=len)
    if at:
        things = [t for t in things if t.position == at[-1]]
    if turn.task == "count":
        assert int(turn.answer) == len(things)
    elif turn.task in ("color", "shape", "position"):
        assert {getattr(t, turn.task) for t in things} == {turn.answer}
    elif turn.task == "motion":
        assert scene.things[0] in things and turn.answer == scene.direction
    elif turn.task == "json":
        data = json.loads(turn.answer)
        assert [o["position"] for o in data["objects"]] == [t.position for t in scene.things]
        assert data["text"] == (scene.text.content if scene.text else None)
    elif turn.task in ("word", "digits", "copy"):
        assert scene.text is not None and turn.answer == " ".join(scene.text.lines)


def test_a_description_is_scored_by_its_facts() -> None:
    scene = next(s for s in (sample_scene(i, "objects") for i in range(99)) if len(s.things) == 2)
    turn = Turn("describe", "", questions.describe(scene))
    assert len(facts(turn.answer)) == 5  # number, background, two things, no text
    assert score(turn, turn.answer) == 1.0
    wrong = turn.answer.replace(scene.things[0].shape + " is", "blob is", 1)
    assert score(turn, wrong) == pytest.approx(4 / 5)
    assert score(turn, turn.answer + " " + turn.answer) == 1.0 and score(turn, "") == 0.0
    assert score(Turn("color", "", "red"), " red ") == 1.0 and score(Turn("color", "", "red"), "dark red") == 0.0


def test_patch_labels_name_what_a_patch_shows() -> None:
    scene = sample_scene(5, "objects")
    grid_h, grid_w = round(scene.height / 14), round(scene.width / 14)
    labels = patch_labels(scene, 0, grid_h, grid_w).reshape(grid_h, grid_w, -1)
    for thing in scene.things:
        row, column = int(thing.y / scene.height * grid_h), int(thing.x / scene.width * grid_w)
        assert labels[row, column, 0] == 1 + list(COLORS).index(thing.color)
        assert labels[row, column, 1] == 1 + SHAPES.index(thing.shape)
    assert not labels[..., 2:4].any()
    assert labels[0, -1, 4] == 1 + POSITIONS.index("top right") and labels[-1, 0, 4] == 1 + POSITIONS.index(
        "bottom left"
    )
    assert set(labels[..., 5].flat) == {1 + list(BACKGROUNDS).index(scene.background)}
    assert (1 + len(COLORS), 1 + len(SHAPES), 37, 37, 10, 1 + len(BACKGROUNDS)) == LABEL_SIZES
