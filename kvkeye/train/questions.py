"""Questions about a scene with one canonical answer each, and the scoring of answers.

Knows scenes and English templates; knows nothing of pictures, tokens or models.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import dataclass

from kvkeye.train.scenes import BACKGROUNDS, COLORS, DIRECTIONS, POSITIONS, ROWS, SHAPES, Scene, Thing

TASKS = ("color", "shape", "count", "position", "background", "motion", "word", "digits", "copy", "describe", "json")
LONG_TASKS = ("copy", "describe", "json")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is the {shape}?",
        "What is the color of the {shape}?",
        "What colour is the {shape}?",
        "Which color does the {shape} have?",
    ),
    "color_at": ("What color is the object at the {position}?", "Which color is at the {position}?"),
    "shape": ("What shape is {color}?", "Which shape is {color}?", "What shape is the {color} object?"),
    "shape_at": ("What shape is at the {position}?", "Which shape is the object at the {position}?"),
    "count": ("How many objects are there?", "How many shapes are in the picture?", "Count the objects."),
    "count_shape": ("How many {shape}s are there?", "How many {shape}s do you see?"),
    "count_color": ("How many {color} objects are there?", "How many objects are {color}?"),
    "position": (
        "Where is the {thing}?",
        "Where is the {thing} in the picture?",
        "What is the position of the {thing}?",
    ),
    "background": ("What color is the background?", "Which color does the background have?"),
    "motion": (
        "Which way does the {thing} move?",
        "In which direction does the {thing} move?",
        "Where does the {thing} move to?",
    ),
    "word": ("What word is written?", "Which word is written in the picture?", "Read the word."),
    "digits": ("What number is written?", "Which number is written in the picture?", "Read the number."),
    "copy": ("Copy the text.", "Copy all the text in the picture.", "Read all the text."),
    "describe": ("Describe the picture.", "Describe this picture in detail.", "What do you see in the picture?"),
    "describe_clip": ("Describe the clip.", "Describe this video.", "What happens in the clip?"),
    "json": ("Describe the picture as JSON.", "Give the scene as JSON."),
}
_NUMBERS = ("no objects", "1 object", "2 objects", "3 objects", "4 objects", "5 objects")


@dataclass(frozen=True)
class Turn:
    """One question, its canonical answer and the task it belongs to."""

    task: str
    question: str
    answer: str


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    counts = Counter(getattr(thing, attribute) for thing in scene.things)
    return [thing for thing in scene.things if counts[getattr(thing, attribute)] == 1]


def _names(scene: Scene) -> list[tuple[str, Thing]]:
    """Unambiguous names of the things: the shape alone where it is unique, and always colour + shape where that is."""
    pairs = Counter((thing.color, thing.shape) for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    named = [(f"{t.color} {t.shape}", t) for t in scene.things if pairs[t.color, t.shape] == 1]
    return named + [(t.shape, t) for t in scene.things if shapes[t.shape] == 1]


def _named(thing: Thing) -> str:
    return f"{'An' if thing.color == 'orange' else 'A'} {thing.color} {thing.shape}"


def describe(scene: Scene) -> str:
    """The canonical description: the number of objects, the background, every object, the text or its absence."""
    if scene.kind == "clip":
        return _describe_clip(scene)
    verb = "is" if len(scene.things) == 1 else "are"
    parts = [f"There {verb} {_NUMBERS[len(scene.things)]} on a {scene.background} background."]
    parts += [f"{_named(thing)} is at the {thing.position}." for thing in scene.things]
    if scene.text is None:
        parts.append("No text is written in the picture.")
    elif scene.kind == "mixed":
        parts.append(f"The text {scene.text.content} is written at the {ROWS[scene.text.row]}.")
    else:
        parts.append(f"The text {scene.text.content} is written in the picture.")
    return " ".join(parts)


def _describe_clip(scene: Scene) -> str:
    mover = scene.things[0]
    parts = [
        f"There {'is' if len(scene.things) == 1 else 'are'} {_NUMBERS[len(scene.things)]} on a "
        f"{scene.background} background.",
        f"{_named(mover)} moves {scene.direction}.",
    ]
    parts += [f"{_named(thing)} stays at the {thing.position}." for thing in scene.things[1:]]
    return " ".join([*parts, "No text is written in the clip."])


def as_json(scene: Scene) -> str:
    """The scene as one line of JSON."""
    things = [{"color": t.color, "shape": t.shape, "position": t.position} for t in scene.things]
    text = scene.text.content if scene.text is not None else None
    return json.dumps({"background": scene.background, "objects": things, "text": text})


def facts(description: str) -> list[str]:
    """The facts of a description, one per sentence; the first sentence holds two (number of objects, background)."""
    sentences = [s.strip() for s in re.split(r"\.", description) if s.strip()]
    if not sentences:
        return []
    return [*sentences[0].split(" on a ", 1), *sentences[1:]]


def score(turn: Turn, answer: str) -> float:
    """1 or 0 by exact match; for a description the share of the canonical facts that the answer states."""
    if turn.task != "describe":
        return float(answer.strip() == turn.answer)
    wanted, given = Counter(facts(turn.answer)), Counter(facts(answer))
    return sum((wanted & given).values()) / sum(wanted.values())


def ask(scene: Scene, task: str, rng: random.Random) -> Turn | None:
    """One question of the task, or None where the scene admits none."""
    simple = {"background": scene.background, "describe": describe(scene), "motion": scene.direction}
    if task == "json":
        return None if scene.kind == "clip" else Turn(task, rng.choice(TEMPLATES[task]), as_json(scene))
    if task in ("word", "digits", "copy"):
        return _ask_text(scene, task, rng)
    if task == "describe" and scene.kind == "clip":
        return Turn(task, rng.choice(TEMPLATES["describe_clip"]), describe(scene))
    if task == "motion":
        if scene.direction is None:
            return None
        name = rng.choice([n for n, thing in _names(scene) if thing is scene.things[0]])
        return Turn(task, rng.choice(TEMPLATES[task]).format(thing=name), scene.direction)
    if task in simple:
        return Turn(task, rng.choice(TEMPLATES[task]), str(simple[task]))
    if not scene.things:
        return None
    return {"color": _ask_color, "shape": _ask_shape, "count": _ask_count, "position": _ask_position}[task](scene, rng)


def _ask_text(scene: Scene, task: str, rng: random.Random) -> Turn | None:
    if scene.text is None:
        return None
    content = scene.text.content
    kind = "copy" if " " in content else "digits" if content.isdigit() else "word"
    if task not in (kind, "copy"):
        return None
    return Turn(task, rng.choice(TEMPLATES[task]), content)


def _ask_color(scene: Scene, rng: random.Random) -> Turn | None:
    unique = _unique(scene, "shape")
    if scene.kind != "clip" and (not unique or rng.random() < 0.35):
        thing = rng.choice(scene.things)
        return Turn("color", rng.choice(TEMPLATES["color_at"]).format(position=thing.position), thing.color)
    if not unique:
        return None
    thing = rng.choice(unique)
    return Turn("color", rng.choice(TEMPLATES["color"]).format(shape=thing.shape), thing.color)


def _ask_shape(scene: Scene, rng: random.Random) -> Turn | None:
    unique = _unique(scene, "color")
    if scene.kind != "clip" and (not unique or rng.random() < 0.35):
        thing = rng.choice(scene.things)
        return Turn("shape", rng.choice(TEMPLATES["shape_at"]).format(position=thing.position), thing.shape)
    if not unique:
        return None
    thing = rng.choice(unique)
    return Turn("shape", rng.choice(TEMPLATES["shape"]).format(color=thing.color), thing.shape)


def _ask_count(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.kind == "clip" or rng.random() < 0.6:
        return Turn("count", rng.choice(TEMPLATES["count"]), str(len(scene.things)))
    by_shape = rng.random() < 0.5
    names = SHAPES if by_shape else tuple(COLORS)
    counts = Counter(thing.shape if by_shape else thing.color for thing in scene.things)
    wanted = rng.choice(sorted({0, *counts.values()}))
    name = rng.choice([n for n in names if counts[n] == wanted])
    template = rng.choice(TEMPLATES["count_shape" if by_shape else "count_color"])
    return Turn("count", template.format(shape=name, color=name), str(wanted))


def _ask_position(scene: Scene, rng: random.Random) -> Turn | None:
    named = [(n, t) for n, t in _names(scene) if scene.kind != "clip" or t is not scene.things[0]]
    if not named:
        return None
    name, thing = rng.choice(named)
    return Turn("position", rng.choice(TEMPLATES["position"]).format(thing=name), thing.position)


def corpus() -> list[str]:
    """Every text that templates can produce, without rendered words: what the tokenizer takes whole words from."""
    texts = [template for group in TEMPLATES.values() for template in group]
    names = [*COLORS, *SHAPES, *BACKGROUNDS, *DIRECTIONS, *POSITIONS, *ROWS]
    texts += names + [f" {name}" for name in names] + [f" {shape}s" for shape in SHAPES] + list(_NUMBERS)
    texts.append("There is are on a background. A is at the moves stays. An is.")
    texts.append(" No text is written in the picture. The text")
    for text in (None, ""):
        things = [{"color": "red", "shape": "star", "position": "top left"}] * 2
        texts.append(json.dumps({"background": "white", "objects": things, "text": text}))
        texts.append(json.dumps({"background": "white", "objects": [], "text": text}))
    # Inside JSON a name follows a quotation mark, which the tokenizer's pattern joins to it.
    texts += [f'"{name}"' for name in names]
    return texts
