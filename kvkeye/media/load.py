"""The one entry point of every picture and clip: a source in, resized uint8 frames out.

`load_media` takes and returns plain data (numbers, strings, bytes, arrays), so that it can move into a child process
that may be killed. Which tokens the frames become is decided by the model's processor.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch

from kvkeye.errors import MediaError
from kvkeye.media.clip import Clip, FrameList, ShorterThanCounted, VideoFile
from kvkeye.media.clip_rules import load_preview_clip, load_slow_fast_clip
from kvkeye.media.image import load_image
from kvkeye.media.job import CLIENT_PIXELS, Job, LoadedMedia, MediaSettings, num_tokens
from kvkeye.media.limits import MediaLimits
from kvkeye.media.options import Kind, MediaOptions
from kvkeye.media.resize import client_size, processor_size, resize_image
from kvkeye.media.source import decode_base64, is_data_uri, open_file, read_bytes, split_data_uri, to_path


def _any_number(tokens: int) -> None:
    """Accepts any number of tokens."""


def load_media(
    kind: Kind,
    source: object,
    options: MediaOptions,
    settings: MediaSettings,
    limits: MediaLimits,
    where: str,
    check_tokens: Callable[[int], None] = _any_number,
    room: int | None = None,
) -> LoadedMedia:
    """Reads, checks, samples and resizes one item.

    Args     source        picture: see `load_image`; clip: path, URI, bytes, list of pictures, or an array of frames
             where         how error messages call this item
             check_tokens  called with the number of language tokens as soon as sizes are known; raises to refuse
             room          tokens into which a clip is shrunk if its options leave its cost open
    Raises   MediaError, RequestError
    """
    job = Job(options, settings, limits, where, check_tokens, room)
    if kind == "image":
        return _load_picture(source, job)
    load = load_preview_clip if settings.version == "preview" else load_slow_fast_clip
    with ExitStack() as stack:
        clip = _open_clip(source, job, stack)
        try:
            return load(clip, job)
        except ShorterThanCounted as shorter:
            clip.num_frames = shorter.num_frames
        try:
            return load(clip, job)
        except ShorterThanCounted:
            raise MediaError(f"{where}: the clip decodes to a different length each time; re-encode it.") from None


def _load_picture(source: object, job: Job) -> LoadedMedia:
    options, settings = job.options, job.settings
    job.limit("max_pixels", settings.max_pixels)
    job.limit("min_pixels", options.max_pixels or settings.max_pixels)
    most = options.max_pixels or settings.max_pixels
    least = min(options.min_pixels or settings.min_pixels, most)
    wished = job.given_size(most)
    frame = load_image(source, job.limits, job.where, options.alpha, options.apply_orientation)
    if wished is None and settings.client_resize:
        client = client_size(frame.shape[0], frame.shape[1], *CLIENT_PIXELS[settings.version])
        frame = resize_image(frame, client)
    height, width = wished or (frame.shape[0], frame.shape[1])
    size = processor_size(height, width, least, most)
    job.check_tokens(num_tokens(1, size))
    return LoadedMedia("image", (resize_image(frame, size, settings.resample)[None],))


def _open_clip(source: object, job: Job, stack: ExitStack) -> Clip:
    """The clip behind any accepted source; `stack` closes what was opened."""
    limits, where = job.limits, job.where
    if isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        return FrameList(source, job.options.fps, limits, where)
    if isinstance(source, str) and is_data_uri(source):
        media_type, payload = split_data_uri(source, where)
        if media_type == "video/jpeg":  # the published client's form: JPEG frames joined by commas
            return FrameList(_jpeg_frames(payload, limits, where), job.options.fps, limits, where)
        source = decode_base64(payload, limits.max_video_bytes, where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = read_bytes(source, limits.max_video_bytes, limits, where)
        return VideoFile(io.BytesIO(data), limits, where)
    if isinstance(source, (str, os.PathLike)):
        path = to_path(source, limits, where)
        return VideoFile(stack.enter_context(open_file(path, limits.max_video_bytes, where)), limits, where)
    raise MediaError(
        f"{where}: an object of type {type(source).__name__}; accepted are a path, bytes, a data: URI, a list of "
        "frames, and uint8 arrays [F, H, W, 3] (numpy) or [F, 3, H, W] (torch)."
    )


def _jpeg_frames(payload: str, limits: MediaLimits, where: str) -> list[bytes]:
    count = payload.count(",") + 1
    if count > limits.max_frames:
        raise MediaError(f"{where}: {count} frames; at most {limits.max_frames} are accepted. Send fewer.")
    if len(payload) * 3 // 4 > limits.max_video_bytes:
        raise MediaError(
            f"{where}: {len(payload)} characters of base64; at most {limits.max_video_bytes} bytes are accepted. "
            "Send fewer or smaller frames."
        )
    parts = payload.split(",")
    return [decode_base64(part, limits.max_image_bytes, f"{where}: frame {k}") for k, part in enumerate(parts)]
