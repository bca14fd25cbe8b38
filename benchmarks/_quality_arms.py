"""The arms of quality.py: each makes one long clip from a prompt and a seed, and counts what that cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvkeye.train.clips.models import RATIO
from kvkeye.train.clips.motion import Motion
from kvkeye.video import ChunkRollout, KStepConfig, apply_videomerge, remove_videomerge
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.methods import merge_config
from kvkeye.video.tiles import plan_tiles

TILE_BATCH = 8


@dataclass
class Made:
    """A clip [F, 3, H, W] in [0, 1], the first frames after its seams, and latent frames that the denoiser saw."""

    frames: Tensor
    borders: list[int]
    denoised: int


@dataclass(frozen=True)
class Arm:
    """One row. `guided`: from a picture; its clips of several lengths are beginnings of the longest."""

    name: str
    meaning: str
    make: Callable[[Any, dict[str, Any], Motion, int, int], Made]
    guided: bool = False


def tiled(
    name: str, changes: dict[str, Any], pipe: Any, call: dict[str, Any], motion: Motion, num_frames: int, seed: int
) -> Made:
    """A named method of `kvkeye video`, or the plain pipeline."""
    latents, native = (num_frames - 1) // RATIO + 1, (call["num_frames"] - 1) // RATIO + 1
    merge = merge_config(name, native, tile_batch=TILE_BATCH, **changes)
    if merge is not None:
        apply_videomerge(pipe, merge)
    generator = torch.Generator().manual_seed(seed)
    try:
        with counted(pipe.transformer) as count:
            frames = pipe(motion.prompt, generator=generator, **call | {"num_frames": num_frames}).frames[0]
    finally:
        remove_videomerge(pipe)
    return Made(frames.float(), borders(merge, native, latents), count[0])


def borders(merge: VideoMergeConfig | None, native: int, latents: int) -> list[int]:
    """First pixel frames of tiles after the first, where tiles stay in place."""
    if merge is None or merge.schedule != "static":
        return []
    plan = plan_tiles(latents, native, merge.resolved_overlap(native))
    return [RATIO * (start - 1) + 1 for start in plan.starts if start]


def rolled(config: KStepConfig, pipe: Any, call: dict[str, Any], motion: Motion, num_frames: int, seed: int) -> Made:
    """Chunks from the motion's own first frame."""
    new = call["num_frames"] - 1
    chunks = -(-(num_frames - 1) // new)
    rollout = ChunkRollout(pipe, KStepConfig(**{**vars(config), "seed": seed}))
    arguments = {"prompt": motion.prompt, **{k: v for k, v in call.items() if k != "output_type"}}
    with counted(pipe.transformer) as count:
        made = [chunk.frames for chunk in rollout.run(motion.frames(1), chunks, arguments)]
    return Made(torch.cat(made)[:num_frames], [1 + new * i for i in range(1, chunks)], count[0])


@contextmanager
def counted(module: Any) -> Iterator[list[int]]:
    """Counts the latent frames of every forward pass, guidance branches and candidates included."""
    count = [0]

    def see(layer: Any, args: Any, out: Tensor) -> None:  # [B, D, T, h, w]
        count[0] += out.shape[0] * out.shape[2]

    # A tiled run replaces the denoiser's own forward pass; its first layer stays.
    handle = module.patch_embedding.register_forward_hook(see)
    try:
        yield count
    finally:
        handle.remove()


def _tiles(name: str, meaning: str, label: str = "", **changes: Any) -> Arm:
    return Arm(label or name, meaning, partial(tiled, name, changes))


def _chunks(name: str, meaning: str, **settings: Any) -> Arm:
    return Arm(name, meaning, partial(rolled, KStepConfig(**settings)), guided=True)


ARMS = {
    arm.name: arm
    for arm in (
        _tiles("direct", "the model's own sampling at the full length"),
        _tiles("concat", "independent clips in a row"),
        _tiles("freenoise", "FreeNoise: shuffled noise, windows in self-attention"),
        _tiles("genl", "Gen-L-Video: plain averages, half overlap"),
        _tiles("videomerge", "VideoMerge as published"),
        _tiles("videomerge", "VideoMerge, a throw-away latent before each tile", "anchor", anchor=True),
        _tiles("shifted", "VideoMerge, little overlap, tiles that move every step"),
        _tiles("attention", "VideoMerge's tiles inside self-attention"),
        _chunks("chunks", "plain rollout", num_candidates=1),
        _chunks("truncated-3x2", "3 noises, 2 steps kept", num_candidates=3, k=2, candidate_batch=3),
        _chunks("truncated-5x2", "5 noises, 2 steps kept", num_candidates=5, k=2, candidate_batch=5),
        _chunks("truncated-5x4", "5 noises, 4 steps kept", num_candidates=5, k=4, candidate_batch=5),
        _chunks("coarse-5x2", "as published: 2-step schedules", num_candidates=5, k=2, search="coarse"),
        _chunks("coarse-5x4", "as published: 4-step schedules", num_candidates=5, k=4, search="coarse"),
    )
}
