"""Synthetic scenes: what is in them (`Scene`) and how they look (`render`), both pure functions of a seed.

A scene holds one to five coloured shapes in a 3 x 3 grid of places, or some text, or both; or it is a short clip in
which one shape moves. This module knows nothing of questions, tokens or models.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Literal

from kvkeye.train.fonts import HELD_OUT_FONTS, TRAIN_FONTS, load_font
from kvkeye.train.words import WORDS

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (35, 155, 55),
    "blue": (40, 75, 225),
    "yellow": (245, 220, 45),
    "orange": (245, 130, 25),
    "purple": (130, 45, 170),
    "pink": (250, 140, 195),
    "cyan": (50, 210, 225),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "gray": (135, 135, 135),
    "black": (18, 18, 18),
    "tan": (210, 185, 150),
}
ROWS = ("top", "center", "bottom")

Kind = Literal["objects", "text", "mixed", "clip"]
Split = Literal["train", "held_out", "shifted"]


@dataclass(frozen=True)
class Thing:
    """One shape: its names, the index of its place (0..8, row-major) and its geometry in pixels."""

    shape: str
    color: str
    place: int
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @property
    def position(self) -> str:
        return POSITIONS[self.place]


@dataclass(frozen=True)
class Text:
    """Rendered text: its lines, font, size in pixels, left and top edge per line, colour."""

    lines: tuple[str, ...]
    font: str
    size: int
    origins: tuple[tuple[int, int], ...]
    row: int
    rgb: tuple[int, int, int]

    @property
    def content(self) -> str:
        return " ".join(self.lines)


@dataclass(frozen=True)
class Scene:
    """Everything that determines the pixels. In a clip the first thing moves by `step` pixels per frame."""

    kind: Kind
    width: int
    height: int
    background: str
    base: tuple[int, int, int]
    texture: int
    things: tuple[Thing, ...] = ()
    text: Text | None = None
    clutter: tuple[tuple[int, int, int, int, int], ...] = ()
    frames: int = 1
    direction: str | None = None
    step: float = 0.0

    def digest(self) -> str:
        """Hash of the whole description; held-out scenes are those in a reserved range of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def at_frame(self, index: int) -> Scene:
        """The scene as it stands in frame `index` (the first thing moved)."""
        if self.direction is None or index == 0:
            return self
        dx, dy = DIRECTIONS[self.direction]
        first = self.things[0]
        moved = replace(first, x=first.x + dx * self.step * index, y=first.y + dy * self.step * index)
        return replace(self, things=(moved, *self.things[1:]))


def sample_scene(seed: int, kind: Kind, split: Split = "train", detail: float = 1.0) -> Scene:
    """Draws a scene.

    `split` "train" and "held_out" differ by the hash range they may fall in; "shifted" is held out too and shows
    fonts, picture sizes and aspect ratios that training never does. `detail` in (0, 1] shrinks the largest pictures
    (the curriculum starts small).
    """
    rng = random.Random(f"{split}/{kind}/{seed}")
    build = {"objects": _objects, "text": _text, "mixed": _mixed, "clip": _clip}[kind]
    while True:
        scene = build(rng, split, detail)
        reserved = int(scene.digest()[:2], 16) < 26
        if reserved == (split != "train"):
            return scene


def is_shifted_size(width: int, height: int) -> bool:
    """True for the picture sizes kept out of training: one in five of the grids of 28-pixel cells."""
    return (7 * round(height / 28) + 3 * round(width / 28)) % 5 == 0


def _size(rng: random.Random, split: Split, low: float, high: float, min_side: int) -> tuple[int, int]:
    """A size whose area is log-uniform in [low, high] and whose aspect is log-uniform in [1/2, 2] (shifted: 2.3)."""
    limit = math.log(2.3 if split == "shifted" else 2.0)
    while True:
        area = math.exp(rng.uniform(math.log(low), math.log(max(low * 1.05, high))))
        aspect = math.exp(rng.uniform(-limit, limit))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if min(width, height) >= min_side and is_shifted_size(width, height) == (split == "shifted"):
            return width, height


def _jitter(rng: random.Random, rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in rgb)
    return r, g, b


def _background(rng: random.Random) -> tuple[str, tuple[int, int, int], int]:
    name = rng.choice(list(BACKGROUNDS))
    return name, _jitter(rng, BACKGROUNDS[name], 8), rng.randrange(1, 10_000) if rng.random() < 0.6 else 0


def _clutter(rng: random.Random, width: int, height: int) -> tuple[tuple[int, int, int, int, int], ...]:
    count = rng.choice((0, 0, 1, 2, 3, 4))
    return tuple(
        (x := rng.randrange(width), y := rng.randrange(height), x + rng.randint(-14, 14), y + rng.randint(-14, 14), 0)
        for _ in range(count)
    )


def _thing(rng: random.Random, place: int, width: int, height: int, look: tuple[str, str]) -> Thing:
    cell_w, cell_h = width / 3, height / 3
    radius = min(cell_w, cell_h) * rng.uniform(0.36, 0.46)
    radius = min(radius, 34.0)
    slack_x, slack_y = (cell_w / 2 - radius) * 0.8, (cell_h / 2 - radius) * 0.8
    x = (place % 3 + 0.5) * cell_w + rng.uniform(-slack_x, slack_x)
    y = (place // 3 + 0.5) * cell_h + rng.uniform(-slack_y, slack_y)
    shape, color = look
    angle = rng.uniform(-10, 10)
    return Thing(
        shape,
        color,
        place,
        round(x, 1),
        round(y, 1),
        round(radius, 1),
        round(angle, 1),
        _jitter(rng, COLORS[color], 14),
    )


def _looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(shape, colour) pairs; half of the scenes repeat shapes or colours on purpose, so that counting is needed."""
    shapes = rng.sample(SHAPES, rng.randint(1, 3)) if rng.random() < 0.35 else list(SHAPES)
    colors = rng.sample(list(COLORS), rng.randint(1, 3)) if rng.random() < 0.35 else list(COLORS)
    return [(rng.choice(shapes), rng.choice(colors)) for _ in range(count)]


def _place_things(rng: random.Random, places: list[int], count: int, width: int, height: int) -> tuple[Thing, ...]:
    chosen = sorted(rng.sample(places, count))
    return tuple(_thing(rng, p, width, height, look) for p, look in zip(chosen, _looks(rng, count)))


def _objects(rng: random.Random, split: Split, detail: float) -> Scene:
    width, height = _size(rng, split, 8_000, 8_000 + 34_000 * detail, 84)
    things = _place_things(rng, list(range(9)), rng.randint(1, 5), width, height)
    return Scene("objects", width, height, *_background(rng), things, None, _clutter(rng, width, height))


def _ink(rng: random.Random, background: str) -> tuple[int, int, int]:
    dark = (rng.randint(0, 60), rng.randint(0, 60), rng.randint(0, 60))
    light = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
    return {"white": dark, "tan": dark, "black": light}.get(background) or rng.choice(
        ((rng.randint(0, 25),) * 3, (rng.randint(235, 255),) * 3)
    )


def _font(rng: random.Random, split: Split) -> tuple[str, int]:
    name = rng.choice(HELD_OUT_FONTS if split == "shifted" else TRAIN_FONTS)
    # Sizes 27 and 31 are kept for the shifted set.
    size = rng.choice((27, 31) if split == "shifted" else (23, 24, 25, 26, 28, 29, 30, 32))
    return name, size


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))


def _text(rng: random.Random, split: Split, detail: float) -> Scene:
    style = rng.choice(("word", "digits", "copy", "copy"))
    if style == "word":
        lines: tuple[str, ...] = (rng.choice(WORDS),)
    elif style == "digits":
        lines = (_digits(rng),)
    else:
        lines = tuple(" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 3)))
        if len(lines) == 1 and " " not in lines[0]:
            lines = (lines[0], rng.choice(WORDS))
    for attempt in itertools.count():
        font, size = _font(rng, split)
        face = load_font(font, size)
        widths = [math.ceil(face.getlength(line)) for line in lines]
        pitch = round(size * rng.uniform(1.2, 1.5))
        room = round(60 * detail) + 4 * attempt  # so that a size that is wanted is reached
        width = max(56, max(widths) + rng.randint(8, 8 + room))
        height = max(56, pitch * len(lines) + rng.randint(4, 4 + room))
        if is_shifted_size(width, height) == (split == "shifted"):
            break
    top = rng.randint(0, max(0, height - pitch * len(lines)))
    aligned = rng.random() < 0.5
    left = rng.randint(2, max(2, width - max(widths) - 2))
    origins = tuple(
        (left if aligned else rng.randint(2, max(2, width - w - 2)), top + i * pitch) for i, w in enumerate(widths)
    )
    background, base, texture = _background(rng)
    text = Text(lines, font, size, origins, 1, _ink(rng, background))
    return Scene("text", width, height, background, base, texture, (), text)


def _mixed(rng: random.Random, split: Split, detail: float) -> Scene:
    word = rng.choice(WORDS) if rng.random() < 0.75 else _digits(rng)
    font, size = _font(rng, split)
    need = math.ceil(load_font(font, size).getlength(word)) + 8
    while True:
        width, height = _size(rng, split, 15_000, 18_000 + 24_000 * detail, 96)
        if width >= need and height / 3 >= size * 1.25:
            break
        if rng.random() < 0.2:
            font, size = _font(rng, split)
            need = math.ceil(load_font(font, size).getlength(word)) + 8
    row = rng.randrange(3)
    places = [p for p in range(9) if p // 3 != row]
    things = _place_things(rng, places, rng.randint(1, 4), width, height)
    background, base, texture = _background(rng)
    x = rng.randint(3, width - need + 3)
    y = round(row * height / 3 + rng.uniform(0.0, height / 3 - size * 1.2))
    text = Text((word,), font, size, ((x, y),), row, _ink(rng, background))
    return Scene("mixed", width, height, background, base, texture, things, text)


def _clip(rng: random.Random, split: Split, detail: float) -> Scene:
    width, height = _size(rng, split, 7_100, 7_600 + 5_000 * detail, 80)
    frames = rng.choice((4, 4, 6, 8))
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    side = width if dx else height
    lane = rng.randrange(3)
    looks = _looks(rng, 2)
    mover = _thing(rng, 3 * lane + 1 if dx else 3 + lane, width, height, looks[0])
    span = side * rng.uniform(0.4, 0.6)
    span = min(span, side - 2 * mover.radius)
    start = rng.uniform(mover.radius, side - mover.radius - span)
    start = start if dx + dy > 0 else side - start
    mover = replace(mover, x=round(start, 1)) if dx else replace(mover, y=round(start, 1))
    things = [mover]
    if rng.random() < 0.5:
        free = [p for p in range(9) if (p // 3 if dx else p % 3) != lane]
        while looks[1] == looks[0]:
            looks[1] = _looks(rng, 1)[0]
        things.append(_thing(rng, rng.choice(free), width, height, looks[1]))
    return Scene(
        "clip",
        width,
        height,
        *_background(rng),
        tuple(things),
        None,
        (),
        frames,
        direction,
        round(span / (frames - 1), 2),
    )


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in the unit circle (y down); the circle has none."""
    if shape == "square":
        return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
    if shape == "diamond":
        return ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0))
    if shape == "triangle":
        return ((0.0, -0.95), (0.95, 0.8), (-0.95, 0.8))
    if shape == "cross":
        a, b = 0.3, 0.95
        arm = ((-a, -b), (a, -b), (a, -a))  # the other three arms are this one turned
        return tuple(
            corner
            for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for corner in ((x * c - y * s, x * s + y * c) for x, y in arm)
        )
    if shape == "star":
        turn = math.pi / 5
        return tuple(
            ((1.0 if i % 2 == 0 else 0.42) * math.sin(i * turn), -(1.0 if i % 2 == 0 else 0.42) * math.cos(i * turn))
            for i in range(10)
        )
    return ()
