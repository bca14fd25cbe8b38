"""One picture, of whatever kind, to uint8 RGB. Limits are checked on the header, before pixels are decoded.

JPEG, PNG and WebP are recognised by content. EXIF orientation is applied and transparency is laid on white; ICC
profiles are ignored. The decoder's own error texts stay in the log: they can hold addresses.
"""

from __future__ import annotations

import io
import logging
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from kvkeye.errors import MediaError
from kvkeye.media.limits import MediaLimits
from kvkeye.media.resize import Frame, check_aspect
from kvkeye.media.source import read_bytes

log = logging.getLogger("kvkeye.media")

Alpha = Literal["white", "drop"]
FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112


def load_image(
    source: object, limits: MediaLimits, where: str = "image", alpha: Alpha = "white", apply_orientation: bool = True
) -> Frame:
    """Reads a picture.

    Args     source  path, `file:` or `data:` URI, bytes, PIL image, uint8 numpy array [H, W], [H, W, 1], [H, W, 3] or
                     [H, W, 4], or uint8 torch tensor [1, H, W], [3, H, W] or [4, H, W]
             where   how error messages call this picture
    Returns  uint8 [H, W, 3], contiguous
    Raises   MediaError
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        picture = _from_array(source, limits, where)
    elif isinstance(source, Image.Image):
        check_dimensions(source.height, source.width, limits, where)
        picture = source
    else:
        picture = _open(read_bytes(source, limits.max_image_bytes, limits, where), limits, where)
    try:
        picture.load()
        if apply_orientation:
            picture = _upright(picture)
        rgb = _to_rgb(picture, alpha, where)
    except MediaError:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever the broken bytes provoke
        log.info("%s: decoding failed: %r", where, error)
        raise MediaError(f"{where}: the picture is truncated or damaged; send the whole file.") from None
    return np.ascontiguousarray(rgb)


def check_dimensions(height: int, width: int, limits: MediaLimits, where: str) -> None:
    """Raises `MediaError` where a picture or a clip's frame is over the limits on sides, pixels or aspect."""
    if max(height, width) > limits.max_side or height * width > limits.max_image_pixels:
        raise MediaError(
            f"{where}: {width}x{height} pixels; at most {limits.max_side} per side and {limits.max_image_pixels} in "
            "all are accepted. Scale it down first."
        )
    check_aspect(height, width, limits.max_aspect, where)


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


def _from_array(source: np.ndarray[Any, Any] | torch.Tensor, limits: MediaLimits, where: str) -> Image.Image:
    if isinstance(source, torch.Tensor):
        if source.dim() != 3:
            raise _bad_array(where, source)
        channels, array = source.shape[0], source.detach().cpu().permute(1, 2, 0).numpy()
    else:
        channels, array = source.shape[2] if source.ndim == 3 else 1, source
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise _bad_array(where, source)
    check_dimensions(array.shape[0], array.shape[1], limits, where)
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _bad_array(where: str, source: np.ndarray[Any, Any] | torch.Tensor) -> MediaError:
    return MediaError(
        f"{where}: an array of shape {tuple(source.shape)}, {source.dtype}; required is uint8 [H, W, 3] in numpy or "
        "[3, H, W] in torch (1 and 4 channels are accepted too). Convert it."
    )


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # damaged metadata does not make the pixels unreadable
        log.info("EXIF data not readable: %r", error)
        return picture
    return ImageOps.exif_transpose(picture) if orientation in range(2, 9) else picture


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
