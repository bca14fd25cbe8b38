"""Draws a `Scene` with Pillow and labels its patches. Pure functions: the same scene gives the same bytes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from kvkeye.train.fonts import load_font
from kvkeye.train.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, Text, Thing, outline

_OVERSAMPLE = 4
_COLOR_IDS = {name: i + 1 for i, name in enumerate(COLORS)}
_SHAPE_IDS = {name: i + 1 for i, name in enumerate(SHAPES)}
_GLYPH_IDS = {glyph: i + 1 for i, glyph in enumerate("abcdefghijklmnopqrstuvwxyz0123456789")}
_BACKGROUND_IDS = {name: i + 1 for i, name in enumerate(BACKGROUNDS)}
LABELS = ("color", "shape", "glyph", "next glyph", "place", "background")
# Classes per label; 0 = the patch shows none.
LABEL_SIZES = (9, 7, 37, 37, 10, 5)


def render(scene: Scene) -> list[Image.Image]:
    """The frames of the scene, RGB, `scene.height` x `scene.width`; a picture is one frame."""
    canvas = _canvas(scene)
    frames = []
    for index in range(scene.frames):
        image = canvas.copy()
        for thing in scene.at_frame(index).things:
            _draw_thing(image, thing)
        if scene.text is not None:
            _draw_text(image, scene.text)
        frames.append(image)
    return frames


@lru_cache(maxsize=1)
def _noise() -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0.0, 7.0, (512, 512, 1)).astype(np.float32)


def _canvas(scene: Scene) -> Image.Image:
    """Background: plain, or a linear gradient, or fine noise, by the texture number; then muted clutter."""
    width, height, texture = scene.width, scene.height, scene.texture
    base = np.asarray(scene.base, np.float32)
    shade: NDArray[Any]
    if texture == 0:
        image = Image.new("RGB", (width, height), scene.base)
    else:
        if texture % 2:
            angle = texture * 0.37
            x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
            y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
            shade = (14.0 * (math.cos(angle) * x + math.sin(angle) * y))[..., None]
        else:
            row, column = texture % 101, texture % 97
            shade = _noise()[row : row + height, column : column + width]
        image = Image.fromarray(np.clip(base + shade, 0, 255).astype(np.uint8))
    if scene.clutter:
        draw = ImageDraw.Draw(image)
        level = sum(scene.base) // 3
        tone = level - 40 if level > 100 else level + 40
        for x0, y0, x1, y1, _ in scene.clutter:
            draw.line((x0, y0, x1, y1), fill=(tone, tone, tone), width=1)
    return image


def _draw_thing(image: Image.Image, thing: Thing) -> None:
    half = math.ceil(thing.radius) + 1
    left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
    side = 2 * half + 1
    mask = Image.new("L", (side * _OVERSAMPLE, side * _OVERSAMPLE), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = ((thing.x - left) * _OVERSAMPLE, (thing.y - top) * _OVERSAMPLE, thing.radius * _OVERSAMPLE)
    corners = outline(thing.shape)
    if corners:
        c, s = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        draw.polygon([(x + r * (u * c - v * s), y + r * (u * s + v * c)) for u, v in corners], fill=255)
    else:
        draw.ellipse((x - 0.92 * r, y - 0.92 * r, x + 0.92 * r, y + 0.92 * r), fill=255)
    image.paste(thing.rgb, (left, top), mask.reduce(_OVERSAMPLE))


def _draw_text(image: Image.Image, text: Text) -> None:
    draw = ImageDraw.Draw(image)
    font = load_font(text.font, text.size)
    for line, origin in zip(text.lines, text.origins):
        draw.text(origin, line, font=font, fill=text.rgb)


def patch_labels(scene: Scene, frame: int, grid_h: int, grid_w: int) -> NDArray[np.int64]:
    """What each patch shows, [grid_h * grid_w, 6], in the order of `LABELS`; 0 = none.

    The glyphs are those at 1/4 and 3/4 of the patch's width, the place is one of the nine positions.

    Used by the auxiliary loss only. A shape labels every patch whose centre lies in its bounding square.
    """
    scene = scene.at_frame(frame)
    out = np.zeros((grid_h, grid_w, len(LABELS)), np.int64)
    rows, columns = 3 * np.arange(grid_h) // grid_h, 3 * np.arange(grid_w) // grid_w
    out[..., 4] = 3 * rows[:, None] + columns[None, :] + 1
    out[..., 5] = _BACKGROUND_IDS[scene.background]
    ys = (np.arange(grid_h) + 0.5) * scene.height / grid_h
    step = scene.width / grid_w
    xs = (np.arange(grid_w) + 0.5) * step
    for thing in scene.things:
        inside = (np.abs(ys - thing.y) <= thing.radius)[:, None] & (np.abs(xs - thing.x) <= thing.radius)[None, :]
        out[inside, 0] = _COLOR_IDS[thing.color]
        out[inside, 1] = _SHAPE_IDS[thing.shape]
    if scene.text is not None:
        for line, origin in zip(scene.text.lines, scene.text.origins):
            _label_line(out, line, origin, scene.text, ys, (xs - step / 4, xs + step / 4))
    return out.reshape(-1, len(LABELS))


def _label_line(
    out: NDArray[np.int64],
    line: str,
    origin: tuple[int, int],
    text: Text,
    ys: NDArray[Any],
    columns: tuple[NDArray[Any], NDArray[Any]],
) -> None:
    font = load_font(text.font, text.size)
    _, top, _, bottom = font.getbbox(line)
    rows = (ys >= origin[1] + top - 2) & (ys <= origin[1] + bottom + 2)
    edges = [origin[0] + font.getlength(line[:i]) for i in range(len(line) + 1)]
    for glyph, left, right in zip(line, edges, edges[1:]):
        if glyph in _GLYPH_IDS:
            for slot, xs in enumerate(columns):
                out[rows[:, None] & ((xs >= left) & (xs < right))[None, :], 2 + slot] = _GLYPH_IDS[glyph]
