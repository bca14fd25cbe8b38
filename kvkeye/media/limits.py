"""What a picture or a clip may cost before it is refused. Plain numbers; knows no decoder."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class MediaLimits:
    """Limits per item unless the name says otherwise; checked before memory is taken.

    A request's own options can only lower them.
    """

    max_images: int = 32  # per request
    max_videos: int = 4  # per request
    max_image_bytes: int = 20 * MIB  # encoded
    max_image_pixels: int = 64_000_000
    max_side: int = 16_384
    max_aspect: float = 200.0
    max_video_bytes: int = 64 * MIB  # encoded
    max_video_seconds: float = 7200.0
    max_frames: int = 1024  # sampled, or given as a list
    max_decoded_bytes: int = 640 * MIB  # frames held at one time, after resizing where that comes first
    max_decode_seconds: float = 30.0  # wall clock of one clip's decoding
    may_read_files: bool = True  # False: only bytes, data URIs and objects, no paths
