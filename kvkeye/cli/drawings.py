"""The scenes of the demo: drawn, written to files, with questions whose answers are known."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvkeye.train.data import SECONDS_PER_GRID
from kvkeye.train.fonts import font_folder
from kvkeye.train.questions import Turn, ask
from kvkeye.train.render import render
from kvkeye.train.scenes import Kind, sample_scene

log = logging.getLogger("kvkeye.cli")

# What is asked about each kind of scene; a question that a scene does not admit is left out.
TASKS: dict[Kind, tuple[str, ...]] = {
    "objects": ("color", "shape", "count", "position", "describe"),
    "text": ("word", "digits", "copy", "background"),
    "mixed": ("word", "digits", "color", "json"),
    "clip": ("motion", "color", "background", "describe"),
}


@dataclass(frozen=True)
class Drawing:
    """A picture or clip on disk. `item` is the content item of a message that shows it."""

    title: str
    item: dict[str, Any]
    turns: list[Turn]


def draw(seed: int, num_pictures: int, num_clips: int, folder: Path) -> list[Drawing]:
    """Scenes outside the training set, the same for the same seed. Writes PNG files below `folder`."""
    rng = random.Random(seed)
    kinds: tuple[Kind, ...] = ("objects", "text", "mixed")
    if font_folder() is None:
        log.warning("pictures with text are left out: their fonts come with matplotlib (pip install 'kvkeye[train]')")
        kinds = ("objects",)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [kinds[i % len(kinds)] for i in range(num_pictures)]
    pictures = [_drawing(rng, kind, i + 1, folder) for i, kind in enumerate(wanted)]
    return pictures + [_drawing(rng, "clip", i + 1, folder) for i in range(num_clips)]


def _drawing(rng: random.Random, kind: Kind, number: int, folder: Path) -> Drawing:
    turns: list[Turn] = []
    while not turns:
        scene = sample_scene(rng.getrandbits(62), kind, "held_out")
        found = [ask(scene, task, rng) for task in TASKS[kind]]
        turns = [turn for turn in found if turn is not None]
    frames, size = render(scene), f"{scene.width}x{scene.height}"
    if kind != "clip":
        path = folder / f"picture-{number}.png"
        frames[0].save(path)
        return Drawing(f"picture {number}: {path} ({size})", {"type": "image", "image": str(path)}, turns)
    place = folder / f"clip-{number}"
    place.mkdir(exist_ok=True)
    paths = [str(place / f"frame-{i:02}.png") for i in range(len(frames))]
    for frame, name in zip(frames, paths):
        frame.save(name)
    item = {"type": "video", "video": paths, "fps": 1 / SECONDS_PER_GRID}
    return Drawing(f"clip {number}: {place} ({len(paths)} frames of {size})", item, turns)
