"""A photograph to packed bf16 rows: resized, normalised, cut into patches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _measure import Bar, Peer, Row
from PIL import Image
from torch import Tensor

from kvkeye import ops

PATCH = 14
PHOTO = (768, 1365)  # rows, columns
TARGET = (728, 1316)  # what the checkpoint's processor asks for: multiples of 28, at most 1,003,520 pixels
LEVEL = 2 / 255  # one level of uint8 after normalisation


def photograph(rows: int, columns: int) -> Image.Image:
    """The middle of a picture that scikit-image ships, 1411 x 1411."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise RuntimeError("benchmarks/vision.py needs scikit-image for its pictures: pip install scikit-image")
    with Image.open(Path(spec.origin).parent / "data" / "retina.jpg") as image:
        top, left = (image.height - rows) // 2, (image.width - columns) // 2
        return image.convert("RGB").crop((left, top, left + columns, top + rows))


def packing_row(bilinear: bool, quick: bool) -> Row:
    """Ours beside torch's antialiased resize and, for bicubic, beside Pillow and numpy."""
    size, target = ((96, 128), (56, 84)) if quick else (PHOTO, TARGET)
    image = photograph(*size)
    pixels = torch.from_numpy(np.asarray(image).copy())  # [H, W, 3] uint8
    mode = "bilinear" if bilinear else "bicubic"

    def ours() -> Tensor:
        half = [0.5] * 3
        packed: Tensor = ops.pack_patches([pixels], list(target), half, half, bilinear, PATCH, torch.bfloat16)
        return packed

    peers = [Peer("torch", name, side) for name, side in torch_sides(pixels, target, mode).items()]
    if not bilinear:
        peers.append(Peer("Pillow + numpy", "", lambda: with_pillow(image, target)))

    def verify(outputs: list[Tensor]) -> None:
        """Pillow's pixels to a bf16 step; torch's rounding differs by a level or two."""
        mine, *others = (output.float() for output in outputs)
        for peer, other in zip(peers, others):
            steps = 0.6 if peer.group.startswith("Pillow") else 2.6
            gap = (mine - other).abs().max().item()
            if mine.shape != other.shape or gap > steps * LEVEL:
                raise AssertionError(f"pack_patches, {mode}: {gap / LEVEL:.2f} levels from {peer.name}")

    bars = [Bar("torch", 2.0)] if bilinear else [Bar("torch", 4.0), Bar("Pillow + numpy", 8.0)]
    num_bytes = 3 * size[0] * size[1] + 2 * 3 * target[0] * target[1]
    name = f"{size[1]} x {size[0]} photograph to bf16 rows of {target[1]} x {target[0]}, {mode}"
    return Row(name, peers, bars, ours, verify, bytes=num_bytes)


def torch_sides(pixels: Tensor, target: tuple[int, int], mode: str) -> dict[str, Callable[[], Tensor]]:
    """Memory formats and orders of the last two steps; the fastest counts."""

    def resized(contiguous: bool) -> Tensor:
        planes = pixels.permute(2, 0, 1)[None]  # [1, 3, H, W], channels last in memory
        planes = planes.contiguous() if contiguous else planes
        return F.interpolate(planes, size=target, mode=mode, antialias=True)[0]  # [3, h, w] uint8

    def normalise_first(contiguous: bool) -> Tensor:
        return patches(resized(contiguous).float().mul_(LEVEL).sub_(1)).to(torch.bfloat16).flatten(1)

    def patchify_first(contiguous: bool) -> Tensor:
        rows = patches(resized(contiguous)).flatten(1)
        return rows.float().mul_(LEVEL).sub_(1).to(torch.bfloat16)

    return {
        "channels last, normalise, patchify": lambda: normalise_first(False),
        "channels last, patchify, normalise": lambda: patchify_first(False),
        "contiguous, normalise, patchify": lambda: normalise_first(True),
        "contiguous, patchify, normalise": lambda: patchify_first(True),
    }


def patches(planes: Tensor) -> Tensor:
    """[3, h, w] -> view [h / 14 * w / 14, 3, 14, 14] where memory allows."""
    grid = planes.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))  # [3, rows, 14, columns, 14]
    return grid.permute(1, 3, 0, 2, 4).flatten(0, 1)


def with_pillow(image: Image.Image, target: tuple[int, int]) -> Tensor:
    """Pillow's resize, numpy's arithmetic and transpose, torch's rounding to bf16."""
    resized = np.asarray(image.resize(target[::-1], Image.Resampling.BICUBIC))
    scaled = resized.astype(np.float32)
    scaled *= np.float32(LEVEL)
    scaled -= 1
    grid = scaled.reshape(target[0] // PATCH, PATCH, target[1] // PATCH, PATCH, 3).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(grid)).flatten(0, 1).flatten(1).to(torch.bfloat16)
