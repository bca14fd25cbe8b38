"""Comparing the frames of a clip by their colours: the arithmetic below version 1.5's slow and fast frames."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._op import op

_DIGITS = 12  # of the fixed-point reciprocals


def _frame_fits(image: Tensor, patch_size: int) -> Iterator[str]:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3:
        yield f"image is {tuple(image.shape)}, {image.dtype}; expected uint8 [height, width, 3]"
    elif patch_size < 1 or any(side < 1 or side % patch_size for side in image.shape[:2]):
        yield f"image is {tuple(image.shape)}; its sides must be positive multiples of patch_size = {patch_size}"


@op(requires=_frame_fits)
def hsv_patches(image: Tensor, patch_size: int) -> Tensor:
    """An RGB frame as hue, saturation and value, cut into patches.

    OpenCV's 8-bit convention: hue in steps of two degrees, 0 to 179; fixed-point reciprocals of 12 digits.

    Shapes     image [height, width, 3] -> [height / patch * width / patch, 3 patch^2],
               a patch in (channel, row, column) order, patches in raster order
    Args       image uint8
    Returns    uint8
    Numerics   exact, in whole numbers
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     OpenCV, colour conversions, RGB to HSV for 8-bit images; keye-vl-utils 1.5.2
    """
    red, green, blue = image.int().unbind(-1)
    value = image.amax(-1).int()
    spread = value - image.amin(-1).int()
    by_green = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    sector = torch.where(value == red, green - blue, by_green)
    saturation = _scaled(spread, 255, value)
    hue = _scaled(sector, 30, spread)
    planes = torch.stack([torch.where(hue < 0, hue + 180, hue), saturation, value]).to(torch.uint8)
    _, height, width = planes.shape
    cut = planes.view(3, height // patch_size, patch_size, width // patch_size, patch_size)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, 3 * patch_size**2)  # [n, 3 patch^2]


def _scaled(part: Tensor, steps: int, whole: Tensor) -> Tensor:
    """steps * part / whole in fixed point, 0 where `whole` is 0."""
    reciprocals = torch.round((steps << _DIGITS) / torch.arange(256, dtype=torch.float64).clamp_(min=1)).int()
    reciprocals[0] = 0
    return (part * reciprocals.to(whole.device)[whole] + (1 << (_DIGITS - 1))) >> _DIGITS


@hsv_patches.fake
def _(image: Tensor, patch_size: int) -> Tensor:
    patches = image.shape[0] * image.shape[1] // patch_size**2
    return image.new_empty((patches, 3 * patch_size**2))


hsv_patches.implement("cpp")


def _rows_match(a: Tensor, b: Tensor) -> Iterator[str]:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.dim() != 2 or a.shape != b.shape:
        yield f"a is {tuple(a.shape)}, {a.dtype}, b is {tuple(b.shape)}, {b.dtype}; expected uint8 [n, d] both"


@op(requires=_rows_match)
def patch_products(a: Tensor, b: Tensor) -> Tensor:
    """Products of the rows of two frames' patches.

    Shapes     a, b [n, d] -> [n]
    Args       a, b uint8
    Returns    int64
    Numerics   exact, in whole numbers
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     keye-vl-utils 1.5.2: the cosine of two patches
    """
    return (a.long() * b.long()).sum(1)


@patch_products.fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0],), dtype=torch.int64)


patch_products.implement("cpp")
