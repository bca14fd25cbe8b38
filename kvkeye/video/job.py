"""One long clip from prompt to file: sampling that can be killed and continued, then decoding and writing as a stream.

Latents are on disk before anything is decoded. `work` holds the checkpoints; it is emptied when the file is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.adapters import adapter_of, check_clip, denoisers
from kvkeye.video.config import KStepConfig, VideoMergeConfig
from kvkeye.video.decode import is_streaming, stream_frames
from kvkeye.video.fusion import apply_videomerge, remove_videomerge
from kvkeye.video.metrics import VideoMetrics, VideoScores
from kvkeye.video.report import FrameStrip, write_report
from kvkeye.video.rollout import ChunkRollout, fingerprint
from kvkeye.video.scorers import Scorer
from kvkeye.video.state_file import load_state, save_state
from kvkeye.video.steps import SamplingState, StepControl
from kvkeye.video.tiles import plan_tiles
from kvkeye.video.writer import VideoWriter

STATE = "sampling.safetensors"


@dataclass(frozen=True)
class VideoJob:
    """What to make.

    call        the pipeline's arguments (prompt or embeddings, height, width, num_inference_steps, ...)
    num_frames  of the whole clip, in pixel frames;  chunk_frames of one chunk of a rollout
    merge       tiles; None with `search` None: plain sampling at the full length
    search      a rollout from `image`
    """

    out: Path
    work: Path
    call: Mapping[str, Any]
    num_frames: int
    fps: float
    seed: int = 0
    merge: VideoMergeConfig | None = None
    search: KStepConfig | None = None
    image: Any = None
    chunk_frames: int = 0
    scorer: Scorer | None = None
    report: Path | None = None
    title: str = ""


@dataclass
class Outcome:
    """What was made. `facts` hold the costs and, for a rollout, every chunk's seeds and scores."""

    num_frames: int = 0
    borders: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    scores: VideoScores | None = None


def run_job(
    pipe: Any,
    job: VideoJob,
    resume: bool = False,
    on_step: Callable[[int, str, int], bool | None] | None = None,
    on_frames: Callable[[int], None] | None = None,
) -> Outcome:
    """Makes the file. With `resume` it continues what `job.work` holds, to the bytes of an uninterrupted run.

    Args     on_step(chunk, what, step) after every denoising step, False cancels;  on_frames(count) while writing
    Raises   ConfigError, CapacityError (the disk is full; the latents stay), VideoCancelled
    """
    if not resume:
        shutil.rmtree(job.work, ignore_errors=True)
    outcome = Outcome()
    pieces = _rollout(pipe, job, outcome, on_step) if job.search else _sampled(pipe, job, outcome, on_step)
    metrics, strip = VideoMetrics(), FrameStrip()
    with VideoWriter(job.out, job.fps, int(job.call["height"]), int(job.call["width"])) as writer:
        for frames in pieces:
            frames = frames[: job.num_frames - writer.num_frames]
            writer.write(frames)
            if job.report is not None:
                metrics.add(frames)
                strip.add(frames)
            if on_frames is not None:
                on_frames(writer.num_frames)
        outcome.num_frames = writer.num_frames
    if job.report is not None:
        borders = [border for border in outcome.borders if border < outcome.num_frames]
        title = job.title or job.out.name
        outcome.scores = write_report(job.report, title, strip, metrics, borders, job.fps, outcome.facts)
    shutil.rmtree(job.work, ignore_errors=True)
    return outcome


def _sampled(
    pipe: Any, job: VideoJob, outcome: Outcome, on_step: Callable[[int, str, int], bool | None] | None
) -> Iterator[Tensor]:
    """Samples the whole clip, keeping a state per step, and yields its decoded frames."""
    path = job.work / STATE
    key = fingerprint(asdict_plain(job.merge), job.call, job.num_frames, job.seed)
    start, facts = load_state(path) if path.exists() else (None, {})
    if start is not None and facts["key"] != key:
        raise ConfigError(f"{path}: saved by a run with other settings. Run without --resume, or with those settings.")

    def keep(state: SamplingState, is_last: bool) -> None:
        save_state(path, state, key=key)
        if on_step is not None and on_step(0, "clip", state.step) is False:
            from kvkeye.video.progress import VideoCancelled

            raise VideoCancelled(f"cancelled after step {state.step}; run again with --resume to continue.")

    adapter = adapter_of(pipe)
    modules = denoisers(pipe, adapter)
    ratio = temporal_ratio(pipe)
    latent_frames = (job.num_frames - 1) // ratio + 1
    if job.merge is None:
        for module in modules:
            check_clip(adapter, module, latent_frames)
    else:
        apply_videomerge(pipe, job.merge)
        outcome.borders, outcome.facts["tiles"] = _borders(job.merge, adapter.native(modules[0]), latent_frames, ratio)
    generator = torch.Generator(pipe._execution_device).manual_seed(job.seed)
    control = StepControl(modules, pipe.scheduler, (generator,), start, on_step=keep)
    call = {**job.call, "num_frames": job.num_frames, "generator": generator}
    if job.image is not None:
        call["image"] = job.image
    streaming = is_streaming(pipe)
    try:
        with control.watching():
            output = pipe(**call, output_type="latent" if streaming else "pt").frames
    finally:
        remove_videomerge(pipe)
    outcome.facts["forwards"] = control.num_forwards
    if streaming:
        yield from stream_frames(pipe, output)
    else:
        yield output[0].float().cpu()


def _borders(merge: VideoMergeConfig, native: int, latent_frames: int, ratio: int) -> tuple[list[int], int]:
    """First pixel frames of the tiles after the first, where they stay in place; and the number of tiles."""
    tile = merge.resolved_tile(native)
    plan = plan_tiles(latent_frames, tile, merge.resolved_overlap(native))
    if merge.schedule != "static":
        return [], len(plan.starts)
    return [ratio * (start - 1) + 1 for start in plan.starts if start], len(plan.starts)


def _rollout(
    pipe: Any, job: VideoJob, outcome: Outcome, on_step: Callable[[int, str, int], bool | None] | None
) -> Iterator[Tensor]:
    """Yields the chunks' frames as they are made."""
    rollout = ChunkRollout(pipe, job.search, job.scorer, job.work, on_step)
    new = job.chunk_frames - (job.search is not None and job.search.drop_guide)
    chunks = 1 + max(0, -(-(job.num_frames - job.chunk_frames) // new))
    outcome.facts["chunks"], made = [], 0
    for chunk in rollout.run(job.image, chunks, {**job.call, "num_frames": job.chunk_frames}):
        if chunk.index:
            outcome.borders.append(made)
        made += len(chunk.frames)
        outcome.facts["chunks"].append(
            {"index": chunk.index, "seeds": chunk.seeds, "chosen": chunk.chosen, "scores": chunk.scores}
            | asdict(chunk.cost)
        )
        yield chunk.frames


def temporal_ratio(pipe: Any) -> int:
    """Pixel frames per latent frame."""
    for name in ("vae_scale_factor_temporal", "vae_temporal_compression_ratio"):
        if hasattr(pipe, name):
            return int(getattr(pipe, name))
    return 1


def asdict_plain(merge: VideoMergeConfig | None) -> dict[str, Any]:
    """Settings that the result depends on."""
    return {} if merge is None else {k: v for k, v in vars(merge).items() if k != "on_tile"}
