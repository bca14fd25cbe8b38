"""A contact sheet: the pictures and frames that a model is shown, with time, kind and cost under each.

Draws frames and facts; what they are is read from a prepared prompt by `items_of`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from kvkeye.cli.exits import USAGE, CommandError
from kvkeye.cli.terminal import count

Frame = npt.NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WIDTH, MARGIN, GAP = 1600, 12, 8  # pixels
MIN_CELL, MAX_CELL = 112, 480  # width of a frame's place
TITLE_SIZE, LABEL_SIZE, LINE = 18, 12, 15
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
FAST_INK = (170, 90, 0)


@dataclass(frozen=True)
class Shot:
    """One frame: uint8 [height, width, 3], seconds into the clip if known, "image", "frame", "slow" or "fast"."""

    pixels: Frame
    kind: str
    num_tokens: int
    time: float | None = None


@dataclass(frozen=True)
class Item:
    """A picture or clip, `name` as its title."""

    name: str
    shots: Sequence[Shot]

    @property
    def title(self) -> str:
        frames = count(len(self.shots), "picture" if self.shots[0].kind == "image" else "frame")
        return f"{self.name}: {frames}, {count(sum(shot.num_tokens for shot in self.shots), 'token')}"


@dataclass(frozen=True)
class Place:
    """Where a sheet has a frame: its box (left, top, right, bottom) in pixels."""

    item: int
    shot: int
    box: tuple[int, int, int, int]


def contact_sheet(items: Sequence[Item]) -> Image.Image:
    """All frames in reading order, a title line per item. Width at most 1600 pixels; frames never enlarged."""
    places, titles, size = lay_out(items)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font, font = ImageFont.load_default(TITLE_SIZE), ImageFont.load_default(LABEL_SIZE)
    for item, top in zip(items, titles):
        draw.text((MARGIN, top), _fit(draw, item.title, title_font, size[0] - 2 * MARGIN), INK, font=title_font)
    for place in places:
        shot = items[place.item].shots[place.shot]
        left, top, right, bottom = place.box
        picture = Image.fromarray(shot.pixels)
        if picture.size != (right - left, bottom - top):
            picture = picture.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top))
        ink = FAST_INK if shot.kind == "fast" else INK
        draw.text((left, bottom + 2), _label(shot, place.shot + 1), ink, font=font)
        draw.text((left, bottom + 2 + LINE), count(shot.num_tokens, "token"), FAINT, font=font)
    return sheet


def _label(shot: Shot, number: int) -> str:
    if shot.kind == "image":
        return f"{shot.pixels.shape[1]} x {shot.pixels.shape[0]}  image"
    return f"#{number}  {shot.kind}" if shot.time is None else f"{shot.time:.1f} s  {shot.kind}"


def lay_out(items: Sequence[Item]) -> tuple[list[Place], list[int], tuple[int, int]]:
    """(places of all frames, top of each item's title, (width, height) of the sheet)."""
    places: list[Place] = []
    titles: list[int] = []
    top, widest = MARGIN, WIDTH // 4
    for index, item in enumerate(items):
        titles.append(top)
        top += TITLE_SIZE + GAP
        columns, cell = _columns(item.shots)
        widest = max(widest, columns * (cell + GAP) - GAP)
        for start in range(0, len(item.shots), columns):
            row = item.shots[start : start + columns]
            sizes = [_shrunk(shot.pixels, cell) for shot in row]
            bottom = top + max(height for _, height in sizes)
            for column, (width, height) in enumerate(sizes):
                left = MARGIN + column * (cell + GAP)
                places.append(Place(index, start + column, (left, bottom - height, left + width, bottom)))
            top = bottom + 2 * LINE + GAP
        top += GAP
    return places, titles, (widest + 2 * MARGIN, top)


def _columns(shots: Sequence[Shot]) -> tuple[int, int]:
    """(columns, width of one): about as many rows as columns, frames between MIN_CELL and MAX_CELL wide."""
    room = WIDTH - 2 * MARGIN + GAP
    most = room // (MIN_CELL + GAP)
    tallest = max(shot.pixels.shape[0] / shot.pixels.shape[1] for shot in shots)
    columns = min(len(shots), max(1, min(most, math.ceil(math.sqrt(len(shots) * max(tallest, 0.5) * 1.6)))))
    widest = max(shot.pixels.shape[1] for shot in shots)
    return columns, max(MIN_CELL, min(MAX_CELL, room // columns - GAP, widest))


def _shrunk(pixels: Frame, cell: int) -> tuple[int, int]:
    """(width, height) of a frame inside a place of this width and at most 1.5 times its height."""
    height, width = pixels.shape[:2]
    scale = min(1.0, cell / width, 1.5 * cell / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, its beginning cut off where it is too long: its end says what it is about."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text


def items_of(
    names: Sequence[str], media: Sequence[Any], mean: Sequence[float], std: Sequence[float], merge_size: int
) -> list[Item]:
    """The items of a prepared prompt (`MediaInput`), as the model gets them: resized, normalisation undone."""
    return [
        Item(name, list(_shots(item, np.asarray(mean), np.asarray(std), merge_size)))
        for name, item in zip(names, media)
    ]


def _shots(item: Any, mean: npt.NDArray[Any], std: npt.NDArray[Any], merge_size: int) -> Iterator[Shot]:
    first = index = 0
    for t, rows, columns in item.grids:
        for _ in range(t):
            patches = item.pixel_values[first : first + rows * columns].float().numpy()
            first += rows * columns
            side = math.isqrt(patches.shape[1] // 3)
            pixels = patches.reshape(rows, columns, 3, side, side).transpose(0, 3, 1, 4, 2)
            pixels = ((pixels * std + mean) * 255).round().clip(0, 255).astype(np.uint8)
            pixels = pixels.reshape(rows * side, columns * side, 3)
            yield Shot(pixels, _kind(item, index), rows * columns // merge_size**2, _time(item, index))
            index += 1


def _kind(item: Any, index: int) -> str:
    if item.kind == "image":
        return "image"
    return "frame" if item.frame_types is None else ("slow", "fast")[item.frame_types[index]]


def _time(item: Any, index: int) -> float | None:
    if item.timestamps is not None:
        return float(item.timestamps[index])
    return None if item.seconds_per_grid is None else float(index * item.seconds_per_grid)


def check_path(path: str) -> Path:
    """The file to write to. CommandError where that will not work, before anything is computed."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise CommandError(f"--show-frames {path}: a file name ending in {', '.join(SUFFIXES)} is required.", USAGE)
    try:
        if file.exists():
            with file.open("r+b"):
                pass
        else:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
    except OSError as error:
        raise CommandError(f"--show-frames {path}: {error.strerror}. Choose another file.", USAGE) from None
    return file
