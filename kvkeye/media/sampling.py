"""Which frames of a clip are looked at: pure arithmetic on its length and rate. Times in seconds."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

from kvkeye.errors import MediaError
from kvkeye.media.options import MediaOptions

log = logging.getLogger("kvkeye.media")

TOKEN = 28 * 28  # pixels of one language token


@dataclass(frozen=True)
class VideoPolicy:
    """How a checkpoint wants its clips. Pixels per frame and per clip; the defaults are Preview's published ones."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 128 * TOKEN
    max_pixels: int = 768 * TOKEN
    total_pixels: int = 128_000 * TOKEN * 9 // 10
    # Version 1.5 only.
    fast_ratio: float = 0.3  # tokens of a fast frame over those of a slow one
    min_frame_similarity: float = 0.9  # share of similar patches below which a frame is slow
    min_patch_similarity: float = 0.7  # cosine above which two patches are similar
    typing_max_pixels: int = 256 * TOKEN  # frames are compared at this size

    @classmethod
    def slow_fast(cls) -> VideoPolicy:
        """The published defaults of 1.5."""
        total = 65_536 * TOKEN
        return cls(min_frames=1, max_frames=total // (48 * TOKEN), min_pixels=48 * TOKEN, total_pixels=total)


@dataclass(frozen=True)
class Sampled:
    """indices of the wanted frames in the clip, and the rate at which they follow each other."""

    indices: list[int]
    fps: float


def sample_preview(
    num_frames: int, fps: float, options: MediaOptions, policy: VideoPolicy, most: int, where: str
) -> Sampled:
    """An even number of frames, evenly spaced, at about `policy.fps`. `most` is the server's limit."""
    first, last = _range(num_frames, fps, options, where)
    total = last - first + 1
    if total == 1:  # the rule wants two; a clip of one frame is shown twice
        return Sampled([first, first], 2 * fps)
    if options.nframes is not None:
        count = round(options.nframes / 2) * 2
    else:
        at_least = math.ceil((options.min_frames or policy.min_frames) / 2) * 2
        at_most = math.floor((options.max_frames or min(policy.max_frames, total)) / 2) * 2
        wished = min(max(total / fps * (options.fps or policy.fps), at_least), at_most, total)
        count = math.floor(wished / 2) * 2
        if count > most:
            log.warning("%s: %d of %d frames are looked at, not %d: the limit", where, most, total, count)
            count = most // 2 * 2
    if not 2 <= count <= total:
        raise MediaError(
            f"{where}: {count} frames wanted; the clip has {total} and at least 2 are needed. Set nframes."
        )
    return Sampled(_spread(first, last, count), count / total * fps)


def sample_slow_fast(
    num_frames: int, fps: float, options: MediaOptions, policy: VideoPolicy, most: int, where: str
) -> Sampled:
    """As many evenly spaced frames as `policy.fps` gives and the pixel budget allows; at least one."""
    first, last = _range(num_frames, fps, options, where)
    total = last - first + 1
    budget = (options.total_pixels or policy.total_pixels) / (options.min_pixels or policy.min_pixels)
    at_most = min(int(budget), options.max_frames or policy.max_frames)
    wished = options.nframes or int(total / fps * min(options.fps or policy.fps, fps))
    count = max(min(wished, at_most, total), 1)
    if count > most:
        log.warning("%s: %d of %d frames are looked at, not %d: the limit", where, most, total, count)
        count = most
    return Sampled(_spread(first, last, count), count / total * fps)


def _spread(first: int, last: int, count: int) -> list[int]:
    """fp32 and rounding to even, as the reference spaces them."""
    indices: list[int] = torch.linspace(first, last, count).round().long().tolist()
    return indices


def _range(num_frames: int, fps: float, options: MediaOptions, where: str) -> tuple[int, int]:
    """First and last frame within `video_start` and `video_end`."""
    start, end = options.video_start, options.video_end
    if start is None and end is None:
        return 0, num_frames - 1
    duration = num_frames / fps
    first = math.ceil(min(start or 0.0, duration) * fps)
    last = num_frames - 1 if end is None else min(math.floor(min(end, duration) * fps), num_frames - 1)
    if first >= last:
        raise MediaError(
            f"{where}: video_start={start}, video_end={end}; the clip lasts {duration:.2f} s ({num_frames} frames). "
            "Choose a start before the end, both inside the clip."
        )
    return first, last
