"""From scenes to packed batches: rendering, patches, chat text, positions, targets.

`batch(mixture, encoder, seed, step)` is a pure function: seed and step give the data, so a resumed run sees the same
batches. Prompts are the checkpoint's own chat template rendered turn by turn; a test holds
them equal to what the processor renders for serving.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.media.resize import processor_size, resize_image
from kvkeye.models.keye.positions import MediaGrid, mrope_positions
from kvkeye.train.questions import LONG_TASKS, Turn, ask
from kvkeye.train.render import patch_labels, render
from kvkeye.train.scenes import Kind, Scene, Split, sample_scene

PATCH = 14
MERGE = 2
MIN_PIXELS = 3136
MAX_PIXELS = 100352
SECONDS_PER_GRID = 0.5
# How often a scene is asked each kind of question before repeated ones are dropped: what is hard to learn more often.
_SHORT_TASKS = {
    "color": 2, "shape": 2, "count": 5, "position": 4, "background": 1, "motion": 2, "word": 1, "digits": 1
}  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """What a stage of training draws.

    `kinds` weighs the kinds of scenes; `detail` in (0, 1] limits picture size; `images` and `clips` per batch follow
    from `images`; `turns` is the largest number of short questions in one chat; `long_chats` is the chance that a
    scene also gets a chat with one long answer; `no_think` the share of questions with the mode suffix.
    """

    kinds: dict[str, float] = field(default_factory=lambda: {"objects": 1.0})
    images: int = 32
    detail: float = 1.0
    turns: int = 4
    long_chats: float = 0.7
    no_think: float = 0.1

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - {"objects", "text", "mixed", "clip"}
        if unknown or not self.kinds or min(self.kinds.values()) < 0 or sum(self.kinds.values()) <= 0:
            raise ConfigError(
                f"recipe: kinds is {self.kinds}; weights of objects, text, mixed, clip are required; "
                "give at least one a weight above 0"
            )


@dataclass(frozen=True)
class Media:
    """The patches of one picture or clip: uint8 [N, 588] in (channel, row, column) order, and what they show."""

    kind: str
    grid: tuple[int, int, int]
    patches: NDArray[np.uint8]
    labels: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // MERGE**2


@dataclass(frozen=True)
class Chat:
    """One sequence: token ids, which media it shows, and for each turn where its answer tokens stand."""

    media: int
    ids: list[int]
    media_start: int
    answers: list[tuple[int, int]]
    turns: list[Turn]


@dataclass
class Batch:
    """Packed sequences over packed media.

    pixels [N, 588] uint8; grids per media item; labels [N, 6]; ids [T]; pads [n] and pad_sources [n]: token `pads[i]`
    stands for row `pad_sources[i]` of the projector's output; positions [3, T]; cu_seqlens [B + 1] int32;
    rows [A] and targets [A]: hidden state `rows[i]` must predict `targets[i]`; turn_of [A]: the turn that target
    belongs to; turns: those turns.
    """

    pixels: Tensor
    grids: list[MediaGrid]
    labels: Tensor
    ids: Tensor
    pads: Tensor
    pad_sources: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: Tensor
    targets: Tensor
    turn_of: Tensor
    turns: list[Turn]

    def pixel_values(self, dtype: torch.dtype) -> Tensor:
        """Normalised patches [N, 588]: (x / 255 - 0.5) / 0.5."""
        return ((self.pixels.to(torch.float32) / 255 - 0.5) / 0.5).to(dtype)


def patchify(image: Image.Image) -> tuple[NDArray[np.uint8], int, int]:
    """Resizes as the processor does and cuts patches: uint8 [gh * gw, 588] in raster order, gh, gw.

    Values stay uint8, a quarter of what the processor's rows weigh; `Batch.pixel_values` normalises them.
    """
    size = processor_size(image.height, image.width, MIN_PIXELS, MAX_PIXELS)
    gh, gw = size[0] // PATCH, size[1] // PATCH
    pixels = resize_image(np.asarray(image), size).reshape(gh, PATCH, gw, PATCH, 3)
    return pixels.transpose(0, 2, 4, 1, 3).reshape(gh * gw, 3 * PATCH * PATCH), gh, gw


def media_of(scene: Scene, blind: bool = False) -> Media:
    """Patches and labels of a scene; `blind` replaces the pixels by mid grey."""
    cut = [patchify(image) for image in render(scene)]
    gh, gw = cut[0][1:]
    patches = np.concatenate([patches for patches, _, _ in cut])
    if blind:
        patches = np.full_like(patches, 128)
    labels = np.concatenate([patch_labels(scene, i, gh, gw) for i in range(scene.frames)])
    return Media("video" if scene.kind == "clip" else "image", (scene.frames, gh, gw), patches, labels)


class ChatEncoder:
    """Renders chats to token ids exactly as the chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pad = {"image": self._id("<|image_pad|>"), "video": self._id("<|video_pad|>")}
        self._vision = self._id("<|vision_start|>"), self._id("<|vision_end|>")
        self.end = self._id("<|im_end|>")
        self._cache: dict[str, list[int]] = {}

    def _id(self, text: str) -> int:
        found = self._tokenizer.token_to_id(text)
        if found is None:
            raise ConfigError(f"tokenizer: {text!r} is not one token; the family's special tokens are required")
        return int(found)

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 20_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def chat(self, turns: list[Turn], media: Media, index: int = 0, answer: list[int] | None = None) -> Chat:
        """A chat about one media item, which stands before the first question.

        `answer` replaces the tokens of the last turn's answer.
        """
        ids = [*self._encode("<|im_start|>user\n"), self._vision[0]]
        media_start = len(ids)
        ids += [self._pad[media.kind]] * media.num_tokens + [self._vision[1]]
        answers = []
        for i, turn in enumerate(turns):
            if i:
                ids += self._encode("<|im_start|>user\n")
            ids += self._encode(turn.question)
            ids += self._encode("<|im_end|>\n<|im_start|>assistant\n")
            start = len(ids)
            given = answer if i == len(turns) - 1 else None
            ids += [*(given if given is not None else self._encode(turn.answer)), self.end]
            answers.append((start, len(ids)))
            ids += self._encode("\n")
        return Chat(index, ids[: answers[-1][1]], media_start, answers, turns)


def grid_of(media: Media) -> MediaGrid:
    """The grid as the model and the position rule take it; clips run at two frames per second."""
    if media.kind == "video":
        return MediaGrid("video", media.grid, SECONDS_PER_GRID)
    return MediaGrid("image", media.grid)


def pack(media: list[Media], chats: list[Chat]) -> Batch:
    """Packs media and chats; a media item may serve several chats."""
    offsets = np.cumsum([0, *(m.num_tokens for m in media)])
    pads, sources, positions, rows, targets, turn_of = [], [], [], [], [], []
    turns: list[Turn] = []
    lengths = [len(chat.ids) for chat in chats]
    bounds = np.cumsum([0, *lengths])
    for chat, base in zip(chats, bounds):
        item = media[chat.media]
        pads.append(np.arange(item.num_tokens) + base + chat.media_start)
        sources.append(np.arange(item.num_tokens) + offsets[chat.media])
        positions.append(mrope_positions(len(chat.ids), [(chat.media_start, grid_of(item))])[0])
        for turn, (start, stop) in zip(chat.turns, chat.answers):
            rows.append(np.arange(start - 1, stop - 1) + base)
            targets.append(np.asarray(chat.ids[start:stop], np.int64))
            turn_of.append(np.full(stop - start, len(turns), np.int64))
            turns.append(turn)
    return Batch(
        pixels=torch.from_numpy(np.concatenate([m.patches for m in media])),
        grids=[grid_of(item) for item in media],
        labels=torch.from_numpy(np.concatenate([m.labels for m in media])),
        ids=torch.from_numpy(np.concatenate([np.asarray(chat.ids, np.int64) for chat in chats])),
        pads=torch.from_numpy(np.concatenate(pads)),
        pad_sources=torch.from_numpy(np.concatenate(sources)),
        positions=torch.cat(positions, 1),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=max(lengths),
        rows=torch.from_numpy(np.concatenate(rows)),
        targets=torch.from_numpy(np.concatenate(targets)),
        turn_of=torch.from_numpy(np.concatenate(turn_of)),
        turns=turns,
    )


def _chats(scene: Scene, rng: random.Random, mixture: Mixture) -> list[list[Turn]]:
    """The chats of one scene: short questions in one or two chats, and now and then one long answer alone."""
    tasks = [task for task, times in _SHORT_TASKS.items() for _ in range(times)]
    short = [turn for task in tasks if (turn := ask(scene, task, rng)) is not None]
    short = list({turn.question: turn for turn in short}.values())
    rng.shuffle(short)
    short.sort(key=lambda turn: turn.task != "motion")  # of a clip it is what matters, so it is always asked
    short = short[: rng.randint(1, mixture.turns)]
    chats = [short] if short else []
    if rng.random() < mixture.long_chats:
        longer = [turn for task in LONG_TASKS if (turn := ask(scene, task, rng)) is not None]
        weights = [1.0 if turn.task != "json" else 0.25 for turn in longer]
        chats.append([rng.choices(longer, weights)[0]])
    suffix = [
        [Turn(t.task, t.question + "/no_think", t.answer) for t in chat] if rng.random() < mixture.no_think else chat
        for chat in chats
    ]
    return suffix


def batch(mixture: Mixture, encoder: ChatEncoder, seed: int, step: int, rank: int = 0, split: Split = "train") -> Batch:
    """The batch of one step in one process: a pure function of the mixture, the seed, the step and the rank."""
    rng = random.Random(f"{seed}/{step}/{rank}")
    names: list[Kind] = [k for k in mixture.kinds]  # type: ignore[misc]
    media: list[Media] = []
    chats: list[Chat] = []
    for _ in range(mixture.images):
        kind = rng.choices(names, list(mixture.kinds.values()))[0]
        scene = sample_scene(rng.getrandbits(62), kind, split, mixture.detail)
        media.append(media_of(scene))
        chats += [encoder.chat(turns, media[-1], len(media) - 1) for turns in _chats(scene, rng, mixture)]
    return pack(media, chats)


def questions_of(task: str, count: int, split: Split, seed: int = 1) -> list[tuple[Scene, Turn]]:
    """`count` held-out single questions of a task, each about its own scene."""
    kinds: dict[str, tuple[Kind, ...]] = {
        "motion": ("clip",),
        "word": ("text", "mixed"),
        "digits": ("text", "mixed"),
        "copy": ("text",),
        "describe": ("objects", "objects", "mixed", "clip"),
        "json": ("objects", "mixed"),
    }
    rng = random.Random(f"{task}/{split}/{seed}")
    found: list[tuple[Scene, Turn]] = []
    while len(found) < count:
        scene = sample_scene(rng.getrandbits(62), rng.choice(kinds.get(task, ("objects", "objects", "mixed"))), split)
        turn = ask(scene, task, rng)
        if turn is not None and (task != "copy" or " " in turn.answer):
            found.append((scene, turn))
    return found


def pack_single(
    items: list[tuple[Scene, Turn]], encoder: ChatEncoder, blind: bool = False, answers: list[list[int]] | None = None
) -> Batch:
    """Single-turn chats, one per scene, as a service would see them; `answers` replaces the canonical answer tokens."""
    media = [media_of(scene, blind) for scene, _ in items]
    given: list[list[int] | None] = [*answers] if answers else [None] * len(items)
    chats = [encoder.chat([turn], m, i, ids) for i, ((_, turn), m, ids) in enumerate(zip(items, media, given))]
    return pack(media, chats)
