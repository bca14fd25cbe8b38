"""From the words of `kvkeye video` to a job, everything checked before a weight is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvkeye.cli import exits
from kvkeye.errors import MediaError
from kvkeye.media.image import load_image
from kvkeye.media.limits import MediaLimits
from kvkeye.video.adapters import ADAPTERS, check_clip, check_tile
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.folder import PipelineFolder, check_kind
from kvkeye.video.guides import GUIDES
from kvkeye.video.job import VideoJob
from kvkeye.video.methods import METHODS, merge_config, search_config
from kvkeye.video.scorers import GuideScore, JudgeScore, Scorer, WeightedScore
from kvkeye.video.tiles import num_static_tiles


def plan_job(arguments: argparse.Namespace, folder: PipelineFolder) -> VideoJob:
    """The job that the command line asks for.

    Raises   CommandError, ConfigError, MediaError
    """
    method = arguments.method or ("kstep" if arguments.image else "videomerge")
    rollout = METHODS[method].needs_image
    check_kind(folder, GUIDES if rollout else ADAPTERS, method)
    if folder.kind in GUIDES and arguments.image is None:
        raise exits.CommandError(f"--image: a {folder.kind} begins from a picture. Give one.", exits.USAGE)
    if folder.kind not in GUIDES and arguments.image is not None:
        raise exits.CommandError(f"--image: a {folder.kind} takes no picture. Leave it out.", exits.USAGE)
    fps = arguments.fps or folder.fps
    num_frames = folder.ratio * max(1, round(arguments.seconds * fps / folder.ratio)) + 1
    image = None if arguments.image is None else read_picture(arguments.image)
    call: dict[str, Any] = {
        "height": arguments.height or folder.height,
        "width": arguments.width or folder.width,
        "num_inference_steps": arguments.steps or folder.num_inference_steps,
    }
    if folder.kind != "StableVideoDiffusionPipeline":
        call["prompt"] = arguments.prompt
    if folder.max_sequence_length is not None:
        call["max_sequence_length"] = folder.max_sequence_length
    if arguments.negative is not None:
        call["negative_prompt"] = arguments.negative
    guidance = folder.guidance_scale if arguments.guidance is None else arguments.guidance
    if guidance is not None:
        call["max_guidance_scale" if folder.kind.startswith("StableVideo") else "guidance_scale"] = guidance
    common = {"num_frames": num_frames, "fps": fps, "seed": arguments.seed, "image": image}
    out = Path(arguments.out).expanduser()
    common |= {"out": out, "work": out.with_name(out.name + ".work"), "title": f"{arguments.prompt}  ({method})"}
    common["report"] = None if arguments.report is None else Path(arguments.report).expanduser()
    if rollout:
        search = search_config(
            method,
            num_candidates=arguments.candidates,
            k=arguments.k,
            search=arguments.search,
            halving=arguments.halving,
            candidate_batch=arguments.candidate_batch,
            color_anchor=arguments.color_anchor,
            seed=arguments.seed,
        )
        frames = min(folder.num_frames, num_frames) if folder.ratio > 1 else folder.num_frames
        ranked = scorer(arguments, search.search)
        return VideoJob(**common, call=call, search=search, chunk_frames=frames, scorer=ranked)
    merge = merged(arguments, folder, method, folder.latent_frames(num_frames))
    if merge is not None and merge.prompts:
        call["prompt"] = merge.prompts[0]
    return VideoJob(**common, call=call, merge=merge)


def merged(
    arguments: argparse.Namespace, folder: PipelineFolder, method: str, latent_frames: int
) -> VideoMergeConfig | None:
    """The tiles, checked against the model's positional table, and their prompts."""
    adapter, native = ADAPTERS[folder.kind], folder.latent_frames(folder.num_frames)
    merge = merge_config(
        method,
        native,
        tile=arguments.tile,
        overlap=arguments.overlap,
        window=arguments.window,
        schedule=arguments.schedule,
        anchor=arguments.anchor,
        tile_batch=arguments.tile_batch,
    )
    if merge is None or merge.mode == "attention":
        check_clip(adapter, folder.denoiser, latent_frames)
    if merge is None:
        return None
    tile = merge.tile or native
    check_tile(adapter, folder.denoiser, tile + merge.anchor)
    count = num_static_tiles(latent_frames, tile, merge.resolved_overlap(tile))
    prompts = tile_prompts(arguments, count)
    return VideoMergeConfig(**{**vars(merge), "prompts": prompts}) if prompts else merge


def tile_prompts(arguments: argparse.Namespace, count: int) -> tuple[str, ...]:
    """One prompt per tile, from a file or from a model; none where neither was given."""
    if arguments.prompts is not None:
        lines = tuple(line.strip() for line in Path(arguments.prompts).read_text().splitlines() if line.strip())
        if len(lines) != count:
            raise exits.CommandError(
                f"--prompts {arguments.prompts}: {len(lines)} prompts; the clip has {count} tiles, and a line for each "
                "is required.",
                exits.USAGE,
            )
        return lines
    if arguments.refine is None:
        return ()
    from kvkeye.cli.video_models import refine

    return refine(arguments.refine, arguments.prompt, count)


def scorer(arguments: argparse.Namespace, search: str) -> Scorer:
    """Guide similarity above the motion floor, with a judge's opinion where one is asked for."""
    guide = GuideScore(on="pixels" if search == "coarse" else "latents", motion_floor=arguments.motion_floor)
    if arguments.judge is None:
        return guide
    from kvkeye.cli.video_models import judge

    opinion = JudgeScore(judge(arguments.judge, arguments.prompt))
    return WeightedScore({"guide": (1.0, guide), "judge": (1.0, opinion)})


def read_picture(path: str) -> Any:
    """A guide picture, upright, transparency on white. Raises MediaError."""
    from PIL import Image

    if not Path(path).expanduser().is_file():
        raise MediaError(f"--image {path}: no such file. Give a JPEG, PNG or WebP file.")
    return Image.fromarray(load_image(str(Path(path).expanduser()), MediaLimits(), f"--image {path}"))
