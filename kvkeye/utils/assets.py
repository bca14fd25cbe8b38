"""The checkpoints that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def folder_of(name: str | Path) -> Path:
    """The folder of a checkpoint: a path, or the name of a bundled one. It need not exist."""
    path = Path(name).expanduser()
    bundled = ASSETS / path
    return bundled if len(path.parts) == 1 and not path.is_dir() and bundled.is_dir() else path
