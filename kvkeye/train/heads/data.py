"""What the head learns from: the target's own answers to questions about training scenes.

The answers are asked for once and kept in a file; batches are a pure function of the answers, the seed and the step.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvkeye.models.keye.model import KeyeModel
from kvkeye.train.data import Batch, Chat, ChatEncoder, Media, grid_of, media_of, pack
from kvkeye.train.heads.recipe import Data, HeadRecipe
from kvkeye.train.questions import Turn, ask
from kvkeye.train.render import render
from kvkeye.train.scenes import Kind, Scene, Split, sample_scene

FILE = "answers.jsonl"
Messages = list[dict[str, Any]]
# Called with a target's folder, conversations and a limit of tokens: its greedy answers in order, as token ids without
# the end; None where an answer did not end within the limit.
Answerer = Callable[[Path, Iterator[Messages], int], Iterator["list[int] | None"]]


@dataclass(frozen=True)
class Sample:
    """A question about a scene, named by kind and seed, and what the target said."""

    kind: Kind
    scene: int
    task: str
    question: str
    answer: list[int]


def questions(data: Data, seed: int, split: Split = "train") -> Iterator[tuple[Scene, int, Turn]]:
    """(scene, its seed, a question) of all scenes, in order; different questions per scene."""
    rng = random.Random(f"draft/{seed}/{split}")
    names: list[Kind] = list(data.kinds)  # type: ignore[arg-type]
    for _ in range(data.scenes):
        scene_seed, kind = rng.getrandbits(62), rng.choices(names, list(data.kinds.values()))[0]
        scene = sample_scene(scene_seed, kind, split)
        tasks = [task for task, mean in data.tasks.items() for _ in range(int(mean + rng.random()))]
        turns = [turn for task in tasks if (turn := ask(scene, task, rng)) is not None]
        for turn in {turn.question: turn for turn in turns}.values():
            yield scene, scene_seed, turn


def messages(scene: Scene, question: str) -> Messages:
    """The conversation as a service would get it."""
    frames = [np.asarray(frame) for frame in render(scene)]
    if scene.kind == "clip":
        item: dict[str, Any] = {"type": "video", "video": np.stack(frames)}
    else:
        item = {"type": "image", "image": frames[0]}
    return [{"role": "user", "content": [item, {"type": "text", "text": question}]}]


def load_answers(recipe: HeadRecipe, answer: Answerer) -> list[Sample]:
    """The answers of the recipe's questions, from the output folder or, the first time, from the target."""
    path = recipe.output / FILE
    if not path.is_file():
        recipe.output.mkdir(parents=True, exist_ok=True)
        asked = list(questions(recipe.data, recipe.seed))
        conversations = (messages(scene, turn.question) for scene, _, turn in asked)
        answers = answer(recipe.target, conversations, recipe.data.max_tokens)
        partial = path.with_suffix(".partial")
        with partial.open("w") as stream:
            for (scene, seed, turn), ids in zip(asked, answers):
                if ids is not None:
                    sample = Sample(scene.kind, seed, turn.task, turn.question, ids)
                    stream.write(json.dumps(asdict(sample)) + "\n")
        os.replace(partial, path)
    return [Sample(**json.loads(line)) for line in path.read_text().splitlines()]


def frequent_tokens(samples: Sequence[Sample], count: int, end: int) -> list[int]:
    """The `count` most frequent tokens of the answers, ascending; ties by id, the unseen last."""
    counts = Counter(token for sample in samples for token in sample.answer) + Counter({end: len(samples)})
    ranked = sorted(range(max(count, max(counts) + 1)), key=lambda token: (-counts[token], token))
    return sorted(ranked[:count])


class Source:
    """Batches of whole scenes with all their questions; media embeddings are computed once per scene."""

    def __init__(self, samples: Sequence[Sample], encoder: ChatEncoder, model: KeyeModel, seed: int) -> None:
        self.encoder, self.model, self.seed = encoder, model, seed
        by_scene: dict[int, list[Sample]] = {}
        for sample in samples:
            by_scene.setdefault(sample.scene, []).append(sample)
        self.scenes = list(by_scene.values())
        self._media: dict[int, tuple[Media, Tensor]] = {}

    def batch(self, step: int, images: int) -> tuple[Batch, Tensor]:
        """A step's packed chats, and the embeddings [T, H] of their tokens, media merged in."""
        epoch, first = divmod(step * images, len(self.scenes))
        order = list(range(len(self.scenes)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        chosen = [self.scenes[index] for index in order[first : first + images]]
        return self.pack(chosen)

    def pack(self, scenes: Sequence[Sequence[Sample]]) -> tuple[Batch, Tensor]:
        media: list[Media] = []
        embeds: list[Tensor] = []
        chats: list[Chat] = []
        for samples in scenes:
            item, own = self._encoded(samples[0])
            for sample in samples:
                turn = Turn(sample.task, sample.question, "")
                chats.append(self.encoder.chat([turn], item, len(media), sample.answer))
            media.append(item)
            embeds.append(own)
        packed = pack(media, chats)
        merged = torch.cat(embeds).to(self.model.dtype)[packed.pad_sources]
        return packed, self.model.embed(packed.ids, merged, packed.pads)

    def _encoded(self, sample: Sample) -> tuple[Media, Tensor]:
        """The medium without its patches, and its embeddings."""
        if sample.scene not in self._media:
            item = media_of(sample_scene(sample.scene, sample.kind, "train"))
            pixels = (torch.from_numpy(item.patches).to(torch.float32) / 255 - 0.5) / 0.5
            embeds = self.model.encode_media(pixels.to(self.model.dtype), [grid_of(item)])
            light = Media(item.kind, item.grid, item.patches[:0], item.labels[:0])
            self._media[sample.scene] = light, embeds.to(torch.bfloat16)
        return self._media[sample.scene]
