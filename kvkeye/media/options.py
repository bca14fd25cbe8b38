"""What a request may say about one picture or clip: names, types, ranges. Options lower limits, never raise them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from kvkeye.errors import RequestError
from kvkeye.media.decode.picture import Alpha

Kind = Literal["image", "video"]

_IMAGE = ("min_pixels", "max_pixels", "resized_height", "resized_width", "alpha", "apply_orientation")
_VIDEO = (
    "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end", "min_pixels", "max_pixels",
    "total_pixels", "resized_height", "resized_width", "min_frame_similarity",
)  # fmt: skip
_INTEGERS = (
    "min_pixels", "max_pixels", "resized_height", "resized_width", "nframes", "min_frames", "max_frames",
    "total_pixels",
)  # fmt: skip
_ALIASES = {
    "num_frames": "nframes",
    "video_total_pixels": "total_pixels",
    "start": "video_start",
    "end": "video_end",
}
_IGNORED = ("detail",)  # OpenAI's hint for its own models


@dataclass(frozen=True)
class MediaOptions:
    """Options of one item; None: the checkpoint's default. Pixels are areas, times are seconds."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    alpha: Alpha = "white"
    apply_orientation: bool = True
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    total_pixels: int | None = None
    min_frame_similarity: float | None = None

    @classmethod
    def parse(cls, kind: Kind, data: Mapping[str, Any], where: str) -> MediaOptions:
        """Checks the option fields of a content item. Raises `RequestError` naming the field and the item."""
        allowed = _IMAGE if kind == "image" else _VIDEO
        values: dict[str, Any] = {}
        for given, value in data.items():
            name = _ALIASES.get(given, given)
            if given in _IGNORED or value is None:
                continue
            if name not in allowed:
                raise RequestError(
                    f"{where}: option {given!r} of a {kind}; known are {', '.join(allowed)}. Remove it.", param=given
                )
            if name in values:
                raise RequestError(f"{where}: option {name!r} is given twice under two names. Remove one.", param=given)
            values[name] = _check(name, value, where)
        options = cls(**values)
        options._check_pairs(where)
        return options

    def _check_pairs(self, where: str) -> None:
        if self.fps is not None and self.nframes is not None:
            raise RequestError(f"{where}: both fps={self.fps:g} and nframes={self.nframes}; give one.", param="fps")
        if (self.resized_height is None) != (self.resized_width is None):
            raise RequestError(
                f"{where}: resized_height and resized_width go together; give both.", param="resized_height"
            )
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and a > b:
                raise RequestError(f"{where}: {low}={a} is above {high}={b}; lower it.", param=low)

    @property
    def sets_cost(self) -> bool:
        """True where the request itself says how many frames or pixels of a clip it wants."""
        names = (
            "fps",
            "nframes",
            "min_frames",
            "max_frames",
            "min_pixels",
            "max_pixels",
            "total_pixels",
            "resized_height",
        )
        return any(getattr(self, name) is not None for name in names)

    def limit(self, name: str, most: float, where: str) -> None:
        """Raises `RequestError` where option `name` is above what the model or the server allows."""
        value = getattr(self, name)
        if value is not None and value > most:
            raise RequestError(
                f"{where}: {name}={value}; at most {most:g} is allowed here. Options can only lower limits.", param=name
            )

    def canonical(self) -> list[Any]:
        """All fields in order, for keys."""
        return [getattr(self, field.name) for field in fields(self)]


def _check(name: str, value: Any, where: str) -> Any:
    if name == "alpha":
        if value not in ("white", "drop"):
            raise RequestError(f"{where}: alpha={value!r}; required is 'white' or 'drop'.", param=name)
        return cast(Alpha, value)
    if name == "apply_orientation":
        if not isinstance(value, bool):
            raise RequestError(f"{where}: apply_orientation={value!r}; required is true or false.", param=name)
        return value
    whole = name in _INTEGERS
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (whole and value != int(value)):
        kind = "a whole number" if whole else "a finite number"
        raise RequestError(f"{where}: {name}={value!r}; required is {kind}.", param=name)
    lowest = 0.0 if name in ("video_start", "video_end", "min_frame_similarity") else (1 if whole else 1e-3)
    highest = 1.0 if name == "min_frame_similarity" else 1e12
    if not lowest <= value <= highest:
        raise RequestError(f"{where}: {name}={value!r}; required is {lowest:g} to {highest:g}.", param=name)
    return int(value) if whole else float(value)
