"""The two published ways to look at a clip: Preview's (one joint group) and 1.5's (slow and fast frames)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvkeye.errors import MediaError
from kvkeye.media.clip import FrameList
from kvkeye.media.frame import Clip, Frame
from kvkeye.media.held import HeldFrames
from kvkeye.media.job import CLIENT_PIXELS, Job, LoadedMedia, num_tokens
from kvkeye.media.resize import BicubicResizer, client_size, processor_size, resize_frame, resize_image
from kvkeye.media.sampling import TOKEN, Sampled, VideoPolicy, sample_preview, sample_slow_fast
from kvkeye.media.slow_fast import SLOW, FrameTyper, slow_fast_sizes

log = logging.getLogger("kvkeye.media")

DEFAULT_LIST_FPS = 2.0  # of a list of frames without `fps`


@dataclass(frozen=True)
class PreviewPlan:
    """Which frames, their size by the clip rule (None for a list), and their final size by the picture rule."""

    sampled: Sampled
    clip_size: tuple[int, int] | None
    size: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        return num_tokens(len(self.sampled.indices), self.size)


def load_preview_clip(clip: Clip, job: Job) -> LoadedMedia:
    """One group for the whole clip, all frames of one size. Raises `ShorterThanCounted`."""
    _check_options(job)
    plan = _plan_list(clip, job) if isinstance(clip, FrameList) else _plan_file(clip, job)
    frames, size = len(plan.sampled.indices), plan.size
    job.check_tokens(plan.num_tokens)
    job.check_held(frames, size)
    out = np.empty((frames, *size, 3), np.uint8)
    resize = BicubicResizer(clip.height, clip.width, plan.clip_size or (clip.height, clip.width))
    for k, frame in enumerate(clip.frames(plan.sampled.indices)):
        out[k] = resize_image(resize(frame), size, job.settings.resample)
    return LoadedMedia("video", (out,), seconds_per_grid=1.0 / plan.sampled.fps)


def _plan_list(clip: FrameList, job: Job) -> PreviewPlan:
    """A list is taken whole, padded to an even number, its frames sized as pictures."""
    options, settings = job.options, job.settings
    padding = [clip.num_frames - 1] * (clip.num_frames % 2)
    sampled = Sampled([*range(clip.num_frames), *padding], options.fps or DEFAULT_LIST_FPS)
    most = options.max_pixels or settings.max_pixels
    least = min(options.min_pixels or settings.min_pixels, most)
    height, width = job.given_size(most) or (clip.height, clip.width)
    return PreviewPlan(sampled, None, processor_size(height, width, least, most))


def _plan_file(clip: Clip, job: Job) -> PreviewPlan:
    """The published rule; shrunk to the room that is left where it would not fit."""
    policy, most_frames = job.settings.video, job.limits.max_frames
    plan = _plan_by(policy, most_frames, clip, job)
    if job.room is None or not job.must_shrink(plan.num_tokens):
        return plan
    pixels = max(job.room * TOKEN, 1)
    # The rule gives every frame twice its share of the total, and at least 1.05 times the least.
    policy = replace(policy, total_pixels=min(policy.total_pixels, pixels // 2))
    most_frames = max(min(most_frames, pixels // int(1.05 * policy.min_pixels)), 2)
    fitted = _plan_by(policy, most_frames, clip, job)
    log.warning(
        "%s: %d tokens by the checkpoint's rule, room for %d: shrunk to %d frames of %dx%d pixels (%d tokens)",
        job.where, plan.num_tokens, job.room, len(fitted.sampled.indices), *fitted.size[::-1], fitted.num_tokens,
    )  # fmt: skip
    return fitted


def _plan_by(policy: VideoPolicy, most_frames: int, clip: Clip, job: Job) -> PreviewPlan:
    fps = clip.fps or DEFAULT_LIST_FPS
    sampled = sample_preview(clip.num_frames, fps, job.options, policy, most_frames, job.where)
    clip_size = _preview_size(clip, len(sampled.indices), policy, job)
    # The picture rule follows the clip rule and may enlarge its smallest frames again.
    size = processor_size(*clip_size, job.settings.min_pixels, job.settings.max_pixels)
    return PreviewPlan(sampled, clip_size, size)


def _preview_size(clip: Clip, frames: int, policy: VideoPolicy, job: Job) -> tuple[int, int]:
    options = job.options
    given = job.given_size(policy.max_pixels)
    if given is not None:
        return client_size(*given, *CLIENT_PIXELS["preview"])
    least = options.min_pixels or policy.min_pixels
    share = (options.total_pixels or policy.total_pixels) / frames * 2
    most = max(min(policy.max_pixels, share), int(least * 1.05))
    return client_size(clip.height, clip.width, least, min(options.max_pixels or most, most))


def _check_options(job: Job) -> None:
    policy, most_frames = job.settings.video, job.limits.max_frames
    job.limit("nframes", most_frames)
    job.limit("max_frames", min(policy.max_frames, most_frames))
    job.limit("min_frames", min(policy.max_frames, most_frames))
    job.limit("max_pixels", policy.max_pixels)
    job.limit("min_pixels", job.options.max_pixels or policy.max_pixels)
    job.limit("total_pixels", policy.total_pixels)


def load_slow_fast_clip(clip: Clip, job: Job) -> LoadedMedia:
    """One group per frame; slow and fast frames differ in size. Raises `ShorterThanCounted`."""
    _check_options(job)
    options, policy = job.options, job.settings.video
    if options.resized_height is not None:
        raise MediaError(
            f"{job.where}: resized_height does not apply to clips of version 1.5; set min_pixels and max_pixels."
        )
    size, prepare = _first_look(clip, job)
    fps = clip.fps or DEFAULT_LIST_FPS
    sampled = sample_slow_fast(clip.num_frames, fps, options, policy, job.limits.max_frames, job.where)
    typer = FrameTyper(*size, policy, options.min_frame_similarity)
    keep = len(sampled.indices) * size[0] * size[1] * 3 <= job.limits.max_decoded_bytes
    held = HeldFrames(*size)
    types: list[int] = []
    for frame in map(prepare, clip.frames(sampled.indices)):
        types.append(typer.type(frame))
        if keep:
            held.append(frame)
    num_slow = types.count(SLOW)
    budget = (options.min_pixels, options.max_pixels, options.total_pixels)
    sizes = slow_fast_sizes(*size, num_slow, len(types) - num_slow, policy, *budget)
    tokens = sum(num_tokens(1, sizes[kind]) for kind in types)
    if job.room is not None and job.must_shrink(tokens):
        sizes = slow_fast_sizes(*size, num_slow, len(types) - num_slow, policy, total_pixels=max(job.room * TOKEN, 1))
        fitted = sum(num_tokens(1, sizes[kind]) for kind in types)
        log.warning("%s: %d tokens by the checkpoint's rule; shrunk to %d", job.where, tokens, fitted)
        tokens = fitted
    job.check_tokens(tokens)
    # Frames too large to keep are decoded a second time, and only their resized copies are held.
    frames = held.drain() if keep else map(prepare, clip.frames(sampled.indices))
    groups = tuple(_owned(resize_frame(frame, sizes[kind]), frame) for frame, kind in zip(frames, types))
    stamps = None if clip.fps is None else _timestamps(sampled.indices, clip.fps)
    return LoadedMedia("video", groups, timestamps=stamps, frame_types=tuple(types))


def _owned(resized: Frame, frame: Frame) -> Frame:
    """[1, H, W, 3]; a frame that needed no resizing is copied, because a decoder may write over it."""
    return (resized.copy() if resized is frame else resized)[None]


def _first_look(clip: Clip, job: Job) -> tuple[tuple[int, int], Callable[[Frame], Frame]]:
    """Size at which frames are typed and resized from: a file's own, or the reference client's for a list."""
    if not isinstance(clip, FrameList):
        return (clip.height, clip.width), lambda frame: frame
    options, policy = job.options, job.settings.video
    limits = (options.min_pixels or policy.min_pixels, options.max_pixels or policy.max_pixels)
    size = client_size(clip.height, clip.width, *limits)
    return size, lambda frame: resize_image(frame, size)


def _timestamps(indices: Sequence[int], fps: float) -> tuple[float, ...]:
    """index / fps, rounded to fp32 as the reference keeps them."""
    return tuple(float(np.float32((1 / fps) * index)) for index in indices)
