"""The model card of a bundled checkpoint: what it is, how it was made, and its measured scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.weights import num_parameters
from kvkeye.train.evaluate import TaskScore, table
from kvkeye.train.fonts import HELD_OUT_FONTS, TRAIN_FONTS
from kvkeye.train.questions import TASKS, TEMPLATES
from kvkeye.train.scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES
from kvkeye.train.words import WORDS

_CARD = """# {name}

A very small Keye-VL (Preview layout, {parameters:,} parameters, bf16) that answers questions about synthetic scenes. It
exists so that every command and test of kvkeye runs on something that answers truly, without a download. It knows
nothing of photographs and of the world; use a real checkpoint for those.

## What it can be asked

Scenes hold one to five shapes ({shapes}) in {colors}, on a {backgrounds} background, at nine positions
({positions}); text of up to three lines from a list of {words} words, and digit strings; clips of 4 to 8 frames in
which one shape moves left, right, up or down. Pictures of about 80 to 300 pixels a side work best; larger ones are
shrunk by its `preprocessor_config.json`.

{questions}

## How it was made

`kvkeye train sft.toml`, on two CPU cores, from nothing: first the vision tower alone learns to name what each patch
shows, then everything learns from questions (loss on answers only). The exported weights are a moving average.
Tower: {vision_layers} layers of width {vision_size}, heads of {vision_head}. Decoder: {text_layers} layers of width
{text_size}, heads of {text_head}.

## Scores

Single questions, greedy answers, each about its own scene. `held_out`: scenes disjoint from training by hash.
`shifted`: also fonts ({held_fonts}), text sizes, picture sizes and aspect ratios that training never shows (training:
{train_fonts}). Accuracy is exact match, for descriptions the share of facts stated rightly;
blind: the same questions about grey pictures; chance: always the most frequent answer.

{table}

`python -m kvkeye.train evaluate FOLDER` prints this table.
"""


def write_card(folder: Path, scores: Sequence[TaskScore]) -> None:
    """Writes `README.md` and `scores.json` into a checkpoint folder."""
    config = KeyeConfig.from_folder(folder)
    card = _CARD.format(
        name=folder.name,
        parameters=num_parameters(config),
        shapes=", ".join(SHAPES),
        colors=", ".join(COLORS),
        backgrounds=" / ".join(BACKGROUNDS),
        positions=", ".join(POSITIONS),
        words=len(WORDS),
        questions="\n".join(f"- {task}: {TEMPLATES[task][0]}" for task in TASKS),
        vision_layers=config.vision.num_hidden_layers,
        vision_size=config.vision.hidden_size,
        vision_head=config.vision.head_dim,
        text_layers=config.text.num_hidden_layers,
        text_size=config.text.hidden_size,
        text_head=config.text.head_dim,
        held_fonts=", ".join(HELD_OUT_FONTS),
        train_fonts=", ".join(TRAIN_FONTS),
        table=table(scores),
    )
    (folder / "README.md").write_text(card)
    (folder / "scores.json").write_text(json.dumps([asdict(s) for s in scores], indent=1) + "\n")
