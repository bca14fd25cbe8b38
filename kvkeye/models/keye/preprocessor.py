"""`preprocessor_config.json`: sizes, resampling and normalisation of pictures, and the policy for clips.

The published files say nothing of clips; the published constants apply then. A file may hold an object `kvkeye_video`
with fields of `VideoPolicy` to say otherwise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError
from kvkeye.media.job import CLIENT_PIXELS, MediaSettings
from kvkeye.media.resize import BICUBIC, BILINEAR, FACTOR
from kvkeye.media.sampling import VideoPolicy
from kvkeye.models.keye.config import KeyeConfig, read_json

log = logging.getLogger("kvkeye.processor")

_HALF = (0.5, 0.5, 0.5)
_PIXELS = {"preview": (3136, 1_003_520), "1.5": CLIENT_PIXELS["1.5"]}


@dataclass(frozen=True)
class Preprocessor:
    """mean and std are per channel, of values in 0..1."""

    media: MediaSettings
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF

    @classmethod
    def from_folder(cls, folder: str | Path, config: KeyeConfig) -> Preprocessor:
        path = Path(folder) / "preprocessor_config.json"
        return cls.from_dict(read_json(path), config, str(path))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], config: KeyeConfig, where: str = "preprocessor_config.json"
    ) -> Preprocessor:
        """Raises ConfigError naming the field; a missing field takes the family's value and is logged."""
        vision = config.vision
        if vision.patch_size * vision.spatial_merge_size != FACTOR:
            raise _refusal(where, "patch_size x merge", vision.patch_size * vision.spatial_merge_size, f"{FACTOR}")
        expected = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size, "temporal_patch_size": 1}
        for name, value in expected.items():
            if data.get(name, value) != value:
                raise _refusal(where, name, data[name], f"{value}, as in config.json")
        low, high = _PIXELS[config.version]
        low, high = _pixels(data, "min_pixels", low, where), _pixels(data, "max_pixels", high, where)
        if low > high:
            raise _refusal(where, "min_pixels", low, f"at most max_pixels {high}")
        resample = _field(data, "resample", BICUBIC, where)
        if resample not in (BILINEAR, BICUBIC):
            raise _refusal(where, "resample", resample, f"{BILINEAR} (bilinear) or {BICUBIC} (bicubic)")
        policy = VideoPolicy() if config.version == "preview" else VideoPolicy.slow_fast()
        settings = MediaSettings(config.version, low, high, resample, video=_policy(data, policy, where))
        return cls(settings, _channels(data, "image_mean", where), _channels(data, "image_std", where))


def _refusal(where: str, name: str, value: object, required: str) -> ConfigError:
    return ConfigError(f"{where}: {name}={value!r}; required is {required}. Correct the checkpoint's JSON.")


def _field(data: Mapping[str, Any], name: str, default: Any, where: str) -> Any:
    if data.get(name) is None:
        log.info("%s: %s is missing; %r is used", where, name, default)
        return default
    return data[name]


def _pixels(data: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """At top level, or inside `size` as newer files have it."""
    size = data.get("size")
    inner = size.get(name) if isinstance(size, Mapping) else None
    value = _field({name: inner} if data.get(name) is None else data, name, default, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(where, name, value, "an area in pixels, at least 1")
    return value


def _channels(data: Mapping[str, Any], name: str, where: str) -> tuple[float, ...]:
    values = _field(data, name, list(_HALF), where)
    numbers = isinstance(values, list) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values)
    if not numbers or not all(math.isfinite(v) for v in values) or (name == "image_std" and min(values) <= 0):
        raise _refusal(where, name, values, "three finite numbers (above 0 for image_std)")
    return tuple(float(v) for v in values)


def _policy(data: Mapping[str, Any], policy: VideoPolicy, where: str) -> VideoPolicy:
    given = data.get("kvkeye_video")
    if given is None:
        return policy
    if not isinstance(given, Mapping):
        raise _refusal(where, "kvkeye_video", given, "a JSON object")
    known = {f.name: type(getattr(policy, f.name)) for f in fields(policy)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise _refusal(where, f"kvkeye_video.{name}", value, f"one of {', '.join(known)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value <= 0 or (known[name] is int and value != int(value)):
            raise _refusal(where, f"kvkeye_video.{name}", value, f"a positive {known[name].__name__}")
        values[name] = known[name](value)
    return replace(policy, **values)
