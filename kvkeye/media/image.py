"""One picture, of whatever kind, to uint8 RGB: files through a decoder, PIL images and arrays here."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.decode.decoder import IN_PROCESS, Decoder
from kvkeye.media.decode.picture import Alpha, finish_picture
from kvkeye.media.frame import Frame, check_dimensions
from kvkeye.media.limits import MediaLimits
from kvkeye.media.source import open_source

_ACCEPTED = "a path, bytes, a data: URI, a PIL image, a numpy array [H, W, 3] and a torch tensor [3, H, W]"


def load_image(
    source: object,
    limits: MediaLimits,
    where: str = "image",
    alpha: Alpha = "white",
    apply_orientation: bool = True,
    decoder: Decoder = IN_PROCESS,
) -> Frame:
    """Reads a picture.

    Args     source   path, `file:` or `data:` URI, bytes, PIL image, uint8 numpy array [H, W], [H, W, 1], [H, W, 3] or
                      [H, W, 4], or uint8 torch tensor [1, H, W], [3, H, W] or [4, H, W]
             where    how error messages call this picture
             decoder  where files are decoded
    Returns  uint8 [H, W, 3], contiguous; may share memory with an array given as source
    Raises   MediaError
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        array = _check_array(source, limits, where)
        if array.ndim == 3 and array.shape[2] == 3:
            return np.ascontiguousarray(array)
        return finish_picture(Image.fromarray(array), where, alpha, False)
    if isinstance(source, Image.Image):
        check_dimensions(source.height, source.width, limits, where)
        return finish_picture(source, where, alpha, apply_orientation)
    with open_source(source, limits.max_image_bytes, limits, where, _ACCEPTED) as file:
        return decoder.picture(file, limits, where, alpha, apply_orientation)


def _check_array(source: np.ndarray[Any, Any] | torch.Tensor, limits: MediaLimits, where: str) -> np.ndarray[Any, Any]:
    """uint8 [H, W], [H, W, 3] or [H, W, 4]. Raises `MediaError`."""
    if isinstance(source, torch.Tensor):
        if source.dim() != 3:
            raise _bad_array(where, source)
        channels, array = source.shape[0], source.detach().cpu().permute(1, 2, 0).numpy()
    else:
        channels, array = source.shape[2] if source.ndim == 3 else 1, source
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise _bad_array(where, source)
    check_dimensions(array.shape[0], array.shape[1], limits, where)
    return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array)


def _bad_array(where: str, source: np.ndarray[Any, Any] | torch.Tensor) -> MediaError:
    return MediaError(
        f"{where}: an array of shape {tuple(source.shape)}, {source.dtype}; required is uint8 [H, W, 3] in numpy or "
        "[3, H, W] in torch (1 and 4 channels are accepted too). Convert it."
    )
