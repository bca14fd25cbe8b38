"""The one entry point of every picture and clip: a source in, resized uint8 frames out.

Files are opened and measured here and decoded by a `Decoder`; sampling and resizing are done here as frames arrive.
Which tokens the frames become is decided by the model's processor.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch

from kvkeye.errors import MediaError
from kvkeye.media.clip import FrameList
from kvkeye.media.clip_rules import load_preview_clip, load_slow_fast_clip
from kvkeye.media.decode.decoder import IN_PROCESS, Decoder
from kvkeye.media.frame import Clip, ShorterThanCounted
from kvkeye.media.image import load_image
from kvkeye.media.job import CLIENT_PIXELS, Job, LoadedMedia, MediaSettings, num_tokens
from kvkeye.media.limits import MediaLimits
from kvkeye.media.options import Kind, MediaOptions
from kvkeye.media.resize import BICUBIC, client_size, processor_size, resize_image
from kvkeye.media.source import decode_base64, is_data_uri, open_source, split_data_uri

MAX_PLANS = 3  # by the index, by the count of packets, by the count of frames
_ACCEPTED = (
    "a path, bytes, a data: URI, a list of frames, and uint8 arrays [F, H, W, 3] (numpy) or [F, 3, H, W] (torch)"
)


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
    decoder: Decoder = IN_PROCESS,
) -> LoadedMedia:
    """Reads, checks, samples and resizes one item.

    Args     source        picture: see `load_image`; clip: path, URI, bytes, list of pictures, or an array of frames
             where         how error messages call this item
             check_tokens  called with the number of language tokens as soon as sizes are known; raises to refuse
             room          tokens into which a clip is shrunk if its options leave its cost open
             decoder       where files are decoded: `MediaDecoder` for files of strangers
    Raises   MediaError, RequestError
    """
    job = Job(options, settings, limits, where, check_tokens, room)
    if kind == "image":
        return _load_picture(source, job, decoder)
    load = load_preview_clip if settings.version == "preview" else load_slow_fast_clip
    with ExitStack() as stack:
        clip = _open_clip(source, job, decoder, stack)
        for _ in range(MAX_PLANS):
            try:
                return load(clip, job)
            except ShorterThanCounted as shorter:
                clip.num_frames = shorter.num_frames
    raise MediaError(f"{where}: the clip decodes to a different length each time; re-encode it.")


def _load_picture(source: object, job: Job, decoder: Decoder) -> LoadedMedia:
    options, settings = job.options, job.settings
    job.limit("max_pixels", settings.max_pixels)
    job.limit("min_pixels", options.max_pixels or settings.max_pixels)
    most = options.max_pixels or settings.max_pixels
    least = min(options.min_pixels or settings.min_pixels, most)
    wished = job.given_size(most)
    frame = load_image(source, job.limits, job.where, options.alpha, options.apply_orientation, decoder)
    if wished is None and settings.client_resize:
        client = client_size(frame.shape[0], frame.shape[1], *CLIENT_PIXELS[settings.version])
        frame = resize_image(frame, client)
    height, width = wished or (frame.shape[0], frame.shape[1])
    size = processor_size(height, width, least, most)
    job.check_tokens(num_tokens(1, size))
    if settings.resample != BICUBIC:
        return LoadedMedia("image", (resize_image(frame, size, settings.resample)[None],))
    return LoadedMedia("image", (frame[None],), resize_to=size)


def _open_clip(source: object, job: Job, decoder: Decoder, stack: ExitStack) -> Clip:
    """The clip behind any accepted source; `stack` closes what was opened."""
    limits, where = job.limits, job.where
    if isinstance(source, str) and is_data_uri(source):
        media_type, payload = split_data_uri(source, where)
        if media_type == "video/jpeg":  # the published client's form: JPEG frames joined by commas
            source = _jpeg_frames(payload, limits, where)
    if isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        return FrameList(source, job.options.fps, limits, where, decoder)
    file = stack.enter_context(open_source(source, limits.max_video_bytes, limits, where, _ACCEPTED))
    return stack.enter_context(decoder.video(file, limits, where))


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
