"""Fonts for rendered text: Pillow's own scalable font, and those that matplotlib ships when it is installed.

Held-out fonts never occur in training.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont

PILLOW_FONT = "pillow"
TRAIN_FONTS = (
    PILLOW_FONT,
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSansMono",
    "DejaVuSans-Oblique",
    "STIXGeneral",
    "cmss10",
)
HELD_OUT_FONTS = ("DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")


@lru_cache(maxsize=1)
def font_folder() -> Path | None:
    """The folder of matplotlib's TrueType fonts, or None when matplotlib is not installed (it is not imported)."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    return folder if folder.is_dir() else None


@lru_cache(maxsize=256)
def load_font(name: str, size: int) -> Any:
    """The font at `size` pixels. Falls back to Pillow's own font only for the name `PILLOW_FONT`."""
    if name == PILLOW_FONT:
        return ImageFont.load_default(size)
    folder = font_folder()
    if folder is None:
        raise FileNotFoundError(
            f"fonts: {name!r} was asked for; it ships with matplotlib, which is not installed; "
            f"install the train extra, or use the font {PILLOW_FONT!r}"
        )
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)
