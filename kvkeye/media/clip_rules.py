"""The two published ways to look at a clip: Preview's (one joint group) and 1.5's (slow and fast frames)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvkeye.errors import MediaError
from kvkeye.media.clip import Clip, FrameList
from kvkeye.media.job import CLIENT_PIXELS, Job, LoadedMedia, num_tokens
from kvkeye.media.resize import Frame, client_size, processor_size, resize_frame, resize_image
from kvkeye.media.sampling import Sampled, sample_preview, sample_slow_fast
from kvkeye.media.slow_fast import SLOW, FrameTyper, slow_fast_sizes

DEFAULT_LIST_FPS = 2.0  # of a list of frames without `fps`


def load_preview_clip(clip: Clip, job: Job) -> LoadedMedia:
    """One group for the whole clip, all frames of one size. Raises `ShorterThanCounted`."""
    _check_options(job)
    options, settings = job.options, job.settings
    least, most = settings.min_pixels, settings.max_pixels
    clip_size = None
    if isinstance(clip, FrameList):
        # A list is taken whole, padded to an even number, its frames sized as pictures.
        padding = [clip.num_frames - 1] * (clip.num_frames % 2)
        sampled = Sampled([*range(clip.num_frames), *padding], options.fps or DEFAULT_LIST_FPS)
        most = options.max_pixels or most
        least = min(options.min_pixels or least, most)
        height, width = job.given_size(most) or (clip.height, clip.width)
        size = processor_size(height, width, least, most)
    else:
        sampled = sample_preview(
            clip.num_frames, clip.fps or DEFAULT_LIST_FPS, options, settings.video, job.limits.max_frames, job.where
        )
        clip_size = _preview_size(clip, len(sampled.indices), job)
        # The picture rule follows the clip rule and may enlarge its smallest frames again.
        size = processor_size(*clip_size, least, most)
    job.check_tokens(num_tokens(len(sampled.indices), size))
    job.check_held(len(sampled.indices), size)
    out = np.empty((len(sampled.indices), *size, 3), np.uint8)
    for k, frame in enumerate(clip.frames(sampled.indices)):
        if clip_size is not None:
            frame = resize_frame(frame, clip_size, "bicubic")
        out[k] = resize_image(frame, size, settings.resample)
    return LoadedMedia("video", (out,), seconds_per_grid=1.0 / sampled.fps)


def _preview_size(clip: Clip, frames: int, job: Job) -> tuple[int, int]:
    options, policy = job.options, job.settings.video
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
    kept: list[Frame] = []
    types: list[int] = []
    for frame in map(prepare, clip.frames(sampled.indices)):
        types.append(typer.type(frame))
        if keep:
            kept.append(frame)
    num_slow = types.count(SLOW)
    budget = (options.min_pixels, options.max_pixels, options.total_pixels)
    sizes = slow_fast_sizes(*size, num_slow, len(types) - num_slow, policy, *budget)
    job.check_tokens(sum(num_tokens(1, sizes[kind]) for kind in types))
    # Frames too large to keep are decoded a second time, and only their resized copies are held.
    frames: Iterable[Frame] = kept if keep else map(prepare, clip.frames(sampled.indices))
    groups = tuple(resize_frame(frame, sizes[kind], "bilinear")[None] for frame, kind in zip(frames, types))
    stamps = None if clip.fps is None else _timestamps(sampled.indices, clip.fps)
    return LoadedMedia("video", groups, timestamps=stamps, frame_types=tuple(types))


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
