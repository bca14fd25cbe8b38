"""Makes a long clip from a short-video model and writes it to a file.

DIR is a pipeline in diffusers' folder layout, or a bundled one: tiny-t2v, tiny-i2v. Text to video grows by overlapping
tiles, image to video by chunks that continue the last frame; --method chooses how. Ctrl-C stops; the same command with
--resume continues to the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from kvkeye.cli import exits, options
from kvkeye.engine.config import DTYPES
from kvkeye.utils.assets import folder_of
from kvkeye.video.config import SCHEDULES, SEARCHES, WINDOWS
from kvkeye.video.methods import METHODS

if TYPE_CHECKING:
    from kvkeye.video.folder import PipelineFolder
    from kvkeye.video.job import VideoJob
    from kvkeye.video.progress import TileProgress

_STATES = 6  # tensors of the latents' size in a sampling state, solver history included
_MARGIN = 64 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    lines = "; ".join(f"{name}: {method.meaning}" for name, method in METHODS.items())
    parser.add_argument("prompt", metavar="PROMPT", help="what happens")
    parser.add_argument("--pipeline", required=True, metavar="DIR", help="a pipeline's folder or name")
    parser.add_argument("--image", metavar="FILE", help="the first frame, for image to video")
    parser.add_argument("--method", choices=METHODS, metavar="NAME", help=lines)
    parser.add_argument("--seconds", type=options.positive, default=10.0, metavar="N", help="length (default: 10)")
    parser.add_argument("--out", default="out.mp4", metavar="FILE", help="default: out.mp4")
    parser.add_argument("--resume", action="store_true", help="continue what an interrupted run left")
    parser.add_argument("--report", metavar="DIR", help="write report.png and report.json there")
    group = parser.add_argument_group("clip (defaults: the pipeline's)")
    group.add_argument("--fps", type=options.positive, metavar="N")
    group.add_argument("--height", type=options.at_least_one, metavar="N", help="pixels")
    group.add_argument("--width", type=options.at_least_one, metavar="N", help="pixels")
    group.add_argument("--steps", type=options.at_least_one, metavar="N", help="denoising steps")
    group.add_argument("--guidance", type=float, metavar="G", help="guidance scale")
    group.add_argument("--negative", metavar="TEXT", help="negative prompt")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group = parser.add_argument_group("tiles, in latent frames")
    group.add_argument("--tile", type=options.at_least_one, metavar="N", help="default: the model's own length")
    group.add_argument("--overlap", type=int, metavar="N")
    group.add_argument("--window", choices=WINDOWS)
    group.add_argument("--schedule", choices=SCHEDULES)
    group.add_argument("--anchor", action="store_true", default=None, help="a throw-away latent before every tile")
    group.add_argument("--tile-batch", type=options.at_least_one, metavar="N", help="tiles per forward pass")
    group.add_argument("--prompts", metavar="FILE", help="a prompt per line and tile, the first replacing PROMPT")
    group.add_argument("--refine", metavar="MODEL", help="a Keye-VL folder that writes a prompt per tile")
    group = parser.add_argument_group("chunks")
    group.add_argument("--candidates", type=options.at_least_one, metavar="N", help="noises per chunk")
    group.add_argument("--k", type=options.at_least_one, metavar="N", help="steps before the choice")
    group.add_argument("--search", choices=SEARCHES)
    group.add_argument("--halving", type=_counts, metavar="K,K,...", help="steps at which the better half stays")
    group.add_argument("--candidate-batch", type=options.at_least_one, metavar="N")
    group.add_argument("--motion-floor", type=float, default=0.25, metavar="X", help="default: 0.25")
    group.add_argument("--color-anchor", type=float, metavar="X", help="pull of colours to the first chunk's, 0 to 1")
    group.add_argument("--judge", metavar="MODEL", help="a Keye-VL folder that scores candidates' frames")
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    group.add_argument("--device", metavar="NAME", help='"cpu", "cuda" (default: a GPU if there is one)')
    group.add_argument("--offload", action="store_true", help="keep on the device only the model at work")


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_counts.__name__ = "ascending list like 1,2,4"


def run(arguments: argparse.Namespace) -> int:
    from kvkeye.cli.video_plan import plan_job
    from kvkeye.video.folder import load_pipeline, read_folder
    from kvkeye.video.job import run_job

    folder = read_folder(folder_of(arguments.pipeline))
    job = plan_job(arguments, folder)
    device, dtype = _machine(arguments)
    _estimate(folder, job, device, dtype)
    progress = Progress(job)
    pipe = load_pipeline(folder, dtype, device, arguments.offload)
    job = progress.watch(job)
    try:
        outcome = run_job(pipe, job, arguments.resume, progress.step, progress.frames)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command with --resume continues from {job.work}", file=sys.stderr)
        raise
    finally:
        progress.end()
    if outcome.scores is not None:
        facts = outcome.scores
        print(
            f"seam ratio {facts.seam_ratio:.2f}, colour drift {facts.color_drift:.3f}, motion {facts.motion:.4f}, "
            f"loop {facts.loop:.2f}; {job.report}/report.png",
            file=sys.stderr,
        )
    print(f"{job.out}")
    return exits.OK


def _machine(arguments: argparse.Namespace) -> tuple[str, Any]:
    import torch

    from kvkeye.engine.machine import default_device

    device = arguments.device or str(default_device())
    name = arguments.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    return device, getattr(torch, name)


def _estimate(folder: PipelineFolder, job: VideoJob, device: str, dtype: Any) -> None:
    """Says what the run will need. Raises CommandError where the disk cannot hold it."""
    import torch

    from kvkeye.cli.estimate import gib
    from kvkeye.engine.machine import available_bytes
    from kvkeye.video.tiles import num_static_tiles

    height, width, steps = (int(job.call[name]) for name in ("height", "width", "num_inference_steps"))
    length = job.chunk_frames if job.search else job.num_frames
    latents = folder.latent_bytes(length, height, width)
    disk = _STATES * latents * (_chunks(job) if job.search else 1) + job.num_frames * height * width // 8 + _MARGIN
    if job.search:
        work = f"{_chunks(job)} chunks of {length} frames, {job.search.num_candidates} candidates each"
    elif job.merge is not None:
        latent_frames = folder.latent_frames(length)
        tile = job.merge.tile or latent_frames
        count, tile = num_static_tiles(latent_frames, tile, job.merge.resolved_overlap(tile)), min(tile, latent_frames)
        passes = 1 if job.merge.mode == "attention" else count
        work = f"{count} tiles of {tile} latents, {passes * steps} passes per guidance branch"
        work += f", {count * tile / latent_frames:.2f} per frame" if passes > 1 else ""
    else:
        work = f"one clip of {folder.latent_frames(length)} latents, {steps} passes per guidance branch"
    seen = (job.merge.tile or folder.latent_frames(length)) if job.merge else folder.latent_frames(length)
    seen = folder.latent_frames(length) if job.merge and job.merge.mode == "attention" else seen
    needed = folder.weight_bytes + 12 * latents + folder.pass_bytes(seen, height, width, dtype.itemsize)
    free = available_bytes(torch.device(device))
    print(
        f"{job.num_frames} frames, {width}x{height}: {work}\n"
        f"memory: weights {gib(folder.weight_bytes)}, latents {gib(latents)}, about {gib(needed)} in all, "
        f"{gib(free)} free on {device}"
        f"{'' if needed < free else ' (too little? try --offload)'}; disk: at most {gib(disk)}",
        file=sys.stderr,
    )
    place = next(parent for parent in job.work.absolute().parents if parent.exists())
    available = shutil.disk_usage(place).free
    if available < disk:
        raise exits.CommandError(
            f"--out {job.out}: {gib(available)} free in {place}; up to {gib(disk)} are needed for latents and clip. "
            "Make room or choose another folder.",
            exits.MEMORY,
        )


def _chunks(job: VideoJob) -> int:
    new = max(1, job.chunk_frames - 1)
    return 1 + max(0, -(-(job.num_frames - job.chunk_frames) // new))


class Progress:
    """One line on stderr: what is being computed, and how long the rest takes."""

    def __init__(self, job: VideoJob) -> None:
        self.begin = time.monotonic()
        self.first: tuple[float, float] | None = None
        self.steps, self.chunks = int(job.call["num_inference_steps"]), _chunks(job) if job.search else 1
        self.total, self.live, self._shown = job.num_frames, sys.stderr.isatty(), 0.0

    def watch(self, job: VideoJob) -> VideoJob:
        """The job with progress per tile."""
        from dataclasses import replace

        if job.merge is None:
            return job
        return replace(job, merge=replace(job.merge, on_tile=self.tile))

    def tile(self, at: TileProgress) -> None:
        done = at.step + (at.first_tile / at.num_tiles + at.branch) / 2
        self._show(f"step {at.step + 1}/{at.num_steps}, tile {at.first_tile + 1}/{at.num_tiles}", done / at.num_steps)

    def step(self, chunk: int, what: str, step: int) -> None:
        if what == "clip":
            self._show(f"step {step}/{self.steps}", step / self.steps, always=step == self.steps)
            return
        share = (chunk + (0.5 if what == "chunk" else 0.0) + 0.5 * step / self.steps) / self.chunks
        self._show(f"chunk {chunk + 1}/{self.chunks}, {what}, step {step}/{self.steps}", share)

    def frames(self, count: int) -> None:
        if self.chunks == 1:
            self._show(f"frame {count}/{self.total}", count / self.total, always=count == self.total)

    def _show(self, text: str, share: float, always: bool = False) -> None:
        now = time.monotonic()
        if self.first is None or share < self.first[1]:
            self.first = (now, share)  # a resumed run's speed is measured from here
        if not always and now - self._shown < (0.2 if self.live else 5.0):
            return
        self._shown = now
        since, gained = now - self.first[0], share - self.first[1]
        left = f", {_clock(since / gained * (1 - share))} left" if gained > 0 and share < 1 else ""
        print(f"\r\033[K{text}{left}" if self.live else f"{text}{left}", end="" if self.live else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        if self.live and self._shown:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
