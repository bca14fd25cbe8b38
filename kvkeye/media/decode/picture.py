"""A JPEG, PNG or WebP file to uint8 RGB. Limits are checked on the header, before pixels are decoded.

EXIF orientation is applied and transparency is laid on white; ICC profiles are ignored. The decoder's own error texts
stay in the log: they can hold addresses. Knows no torch; runs in a worker process or in this one.
"""

from __future__ import annotations

import io
import logging
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.frame import Frame, check_dimensions
from kvkeye.media.limits import MediaLimits
from kvkeye.media.source import check_size

try:  # libjpeg-turbo behind a shorter path than Pillow's: three times as fast, equal to the bit
    import simplejpeg  # type: ignore[import-untyped]
except ImportError:
    simplejpeg = None

log = logging.getLogger("kvkeye.media")

Alpha = Literal["white", "drop"]
FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
_TO_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_picture(file: BinaryIO, limits: MediaLimits, where: str, alpha: Alpha, apply_orientation: bool) -> Frame:
    """The picture in an open file, uint8 [H, W, 3]. Raises `MediaError`."""
    data = file.read(limits.max_image_bytes + 1)  # the file may have grown since its size was read
    check_size(len(data), limits.max_image_bytes, where)
    picture = _open(data, limits, where)
    fast = _decode_jpeg(data) if picture.format == "JPEG" and picture.mode == "RGB" else None
    return finish_picture(picture, where, alpha, apply_orientation, fast)


def finish_picture(
    picture: Image.Image, where: str, alpha: Alpha, apply_orientation: bool, pixels: Frame | None = None
) -> Frame:
    """An opened picture, loaded, upright and RGB. `pixels` are its own, where something else has decoded them."""
    try:
        turn = _TO_UPRIGHT.get(_orientation(picture)) if apply_orientation else None
        if pixels is not None and turn is None:
            return pixels
        picture = picture if pixels is None else Image.fromarray(pixels)
        picture.load()
        return np.ascontiguousarray(_to_rgb(picture if turn is None else picture.transpose(turn), alpha, where))
    except MediaError:
        raise
    except MemoryError:
        raise MediaError(f"{where}: decoding takes more memory than allowed. Scale the picture down.") from None
    except Exception as error:  # Pillow's plug-ins raise whatever the broken bytes provoke
        log.info("%s: decoding failed: %r", where, error)
        raise MediaError(f"{where}: the picture is truncated or damaged; send the whole file.") from None


def _open(data: bytes, limits: MediaLimits, where: str) -> Image.Image:
    """Header only; pixels are decoded by `load`."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise MediaError(
            f"{where}: a picture of more than {limits.max_image_pixels} pixels. Scale it down first."
        ) from None
    except Exception as error:  # as above
        log.info("%s: not recognised: %r", where, error)
        raise MediaError(
            f"{where}: {len(data)} bytes that are no readable JPEG, PNG or WebP picture; convert it to one of these."
        ) from None
    check_dimensions(picture.height, picture.width, limits, where)
    if picture.format in ("PNG", "WEBP") and getattr(picture, "is_animated", False):
        raise MediaError(f"{where}: an animated {picture.format}; send one frame, or a clip as video.")
    return picture


def _decode_jpeg(data: bytes) -> Frame | None:
    """None where simplejpeg is not installed or finds anything amiss: Pillow then decides what can be read."""
    if simplejpeg is None:
        return None
    try:
        pixels: Frame = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        log.info("simplejpeg: %s", error)
        return None
    return pixels


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # damaged metadata does not make the pixels unreadable
        log.info("EXIF data not readable: %r", error)
        return 1


def _to_rgb(picture: Image.Image, alpha: Alpha, where: str) -> Frame:
    if picture.mode.startswith("I"):  # 16-bit grey: 65535 is white
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode == "F":
        raise MediaError(f"{where}: floating-point pixels have no agreed white; convert them to 8 bits first.")
    if alpha == "white" and picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, (255, 255, 255))
        canvas.paste(rgba, mask=rgba.getchannel("A"))
        return np.asarray(canvas)
    return np.asarray(picture.convert("RGB"))
