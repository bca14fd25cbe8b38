"""The committed set of prompts whose answers repeat the input, and how it was made.

    python benchmarks/_repeating.py > benchmarks/prompts/repeating.jsonl

A line is a picture, by kind and number of its scene, and a conversation about it whose last question asks again for
what the prompt already quotes: a description, a copied text, JSON.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from kvkeye.train.questions import ask
from kvkeye.train.render import render
from kvkeye.train.scenes import sample_scene

FILE = Path(__file__).parent / "prompts" / "repeating.jsonl"
KINDS = {"describe": ("objects", 60), "copy": ("text", 40), "json": ("mixed", 30)}


def conversations() -> list[dict[str, Any]]:
    found = []
    for task, (kind, count) in KINDS.items():
        seed = 50_000
        while count:
            seed += 1
            scene, rng = sample_scene(seed, kind, "held_out"), random.Random(seed)  # type: ignore[arg-type]
            first, again = ask(scene, task, rng), ask(scene, task, rng)
            if first is None or again is None or (task == "copy" and len(first.answer.split()) < 4):
                continue
            found.append(
                {"task": task, "kind": kind, "scene": seed, "turns": [first.question, first.answer, again.question]}
            )
            count -= 1
    return found


def load() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def messages(item: dict[str, Any], with_picture: bool = True) -> list[dict[str, Any]]:
    """The conversation as chat messages."""
    picture = np.asarray(render(sample_scene(item["scene"], item["kind"], "held_out"))[0])
    roles = ("user", "assistant", "user")
    found = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, item["turns"])]
    if with_picture:
        found[0]["content"].insert(0, {"type": "image", "image": picture})
    return found


if __name__ == "__main__":
    for item in conversations():
        print(json.dumps(item))
