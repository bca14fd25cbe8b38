"""What the tiny pipelines really do: clips of their own length, from prompts, against the known motion.

Prompts and places come from a seed space that training does not draw from; every combination of words is in training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import WeightError
from kvkeye.train.clips.measures import MotionScores, Recognised, measure, recognise
from kvkeye.train.clips.models import PADDED_TOKENS
from kvkeye.train.clips.motion import Motion, draw

_BATCH = 16
_FIRST_SEED = 1 << 62  # training draws below


@dataclass(frozen=True)
class ClipScores:
    """Of `clips` samples: shares of words that are right (all: every word of a clip), and means of the errors."""

    clips: int
    color_right: float
    shape_right: float
    speed_right: float
    direction_right: float
    all_right: float
    position: float
    velocity: float
    color: float
    drift: float
    presence: float
    identity: float


def held_out(count: int, seed: int = 0, size: int = 32) -> list[Motion]:
    """Motions for measuring."""
    return [draw(_FIRST_SEED + 1_000_003 * seed + i, size) for i in range(count)]


def score(pairs: Sequence[tuple[Tensor, Motion]], placed: bool) -> ClipScores:
    """Scores of clips [F, 3, H, W] in [0, 1] and the motions that they should show."""
    names = [f.name for f in fields(Recognised)]
    right = [[getattr(seen, n) == getattr(m, n) if seen else False for n in names] for seen, m in _seen(pairs)]
    errors = [asdict(measure(frames, motion, placed)) for frames, motion in pairs]
    shares = {f"{name}_right": sum(row[i] for row in right) / len(pairs) for i, name in enumerate(names)}
    means = {f.name: _mean([error[f.name] for error in errors]) for f in fields(MotionScores)}
    return ClipScores(len(pairs), **shares, all_right=sum(map(all, right)) / len(pairs), **means)


def _seen(pairs: Sequence[tuple[Tensor, Motion]]) -> list[tuple[Recognised | None, Motion]]:
    return [(recognise(frames, motion), motion) for frames, motion in pairs]


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else float("nan")


@torch.no_grad()
def evaluate(folder: Path, count: int = 192, seed: int = 0) -> dict[str, ClipScores]:
    """Scores of a folder's own clips, also with captions padded to the pipelines' own length, and of true clips that
    went through its VAE: the bound.

    Raises WeightError: no pipeline's folder.
    """
    pipe, defaults = load(folder)
    motions = held_out(count, seed, int(defaults["height"]))
    guided = type(pipe).__name__ == "WanImageToVideoPipeline"
    made = [*samples(pipe, defaults, motions, guided, seed)]
    plain = {key: value for key, value in defaults.items() if key != "max_sequence_length"}
    padded = [*samples(pipe, plain, motions, guided, seed)]
    num_frames = int(defaults["num_frames"])
    bound = [(_through_vae(pipe, motion.frames(num_frames)), motion) for motion in motions]
    return {
        folder.name: score(made, guided),
        f"{folder.name}, padded to {PADDED_TOKENS}": score(padded, guided),
        "VAE of true clips": score(bound, True),
    }


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A pipeline in fp32 and its defaults. Raises WeightError."""
    from diffusers import DiffusionPipeline

    try:
        defaults = json.loads((folder / "video_defaults.json").read_text())
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightError(f"{folder}: {error}. A folder that `kvkeye train video.toml` wrote is required.") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, defaults


def samples(
    pipe: Any, defaults: dict[str, Any], motions: Sequence[Motion], guided: bool, seed: int = 0
) -> Iterator[tuple[Tensor, Motion]]:
    """Clips [F, 3, H, W] in [0, 1] beside their motions, a generator per clip."""
    call = {key: value for key, value in defaults.items() if key != "fps"} | {"output_type": "pt"}
    size = 1 if guided else _BATCH  # the image pipeline takes one picture
    for first in range(0, len(motions), size):
        part = motions[first : first + size]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + first + i) for i in range(len(part))]
        image = {"image": part[0].frames(1)} if guided else {}
        own = {"prompt": [motion.prompt for motion in part], "generator": generators if size > 1 else generators[0]}
        clips = pipe(**own, **call, **image)
        yield from zip(clips.frames.float(), part)


def _through_vae(pipe: Any, frames: Tensor) -> Tensor:
    clip = frames.transpose(0, 1)[None] * 2 - 1
    back: Tensor = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample[0]
    return (back.transpose(0, 1) + 1) / 2


def table(scores: dict[str, ClipScores]) -> str:
    """The scores as a Markdown table; shares in percent, errors in the units of `MotionScores`."""
    names = [f.name for f in fields(ClipScores)][1:]
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---|" + "---|" * len(names)]
    for what, found in scores.items():
        shown = [getattr(found, name) for name in names]
        percent = [name.endswith("right") or name in ("presence", "identity") for name in names]
        lines.append(f"| {what} | {' | '.join(_shown(v, p) for v, p in zip(shown, percent))} |")
    return "\n".join(lines)


def _shown(value: float, percent: bool) -> str:
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"
