"""Where a model named on the command line lies; the checkpoints that come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvkeye.cli.exits import MODEL_FILES, CommandError
from kvkeye.errors import ConfigError
from kvkeye.utils.assets import ASSETS

PACKAGE = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = "tiny-keye"
RECIPES = {DEFAULT_MODEL: "sft.toml"}  # what builds each bundled model
PIPELINES = ("tiny-t2v", "tiny-i2v")  # of video; built by video.toml


def resolve_model(name: str | None) -> Path:
    """The folder of a model: a path, the name of a bundled one, or None for the default.

    Raises CommandError (exit code 4) where a bundled model is not there
    """
    name = name or DEFAULT_MODEL
    if name not in RECIPES or Path(name).is_dir():
        return Path(name).expanduser()
    folder = ASSETS / name
    if not folder.is_dir():
        raise CommandError(missing(name), MODEL_FILES)
    return folder


def missing(name: str) -> str:
    """What to do about a bundled model that is not there."""
    return (
        f"model {name}: the installed package holds no {ASSETS / name}. "
        f"Build it with `kvkeye train {RECIPES[name]}` and pass the folder that this prints, "
        "or pass the folder of another Keye-VL checkpoint."
    )


@contextmanager
def model_files() -> Iterator[None]:
    """Within the block a ConfigError is about a checkpoint's files."""
    try:
        yield
    except ConfigError as error:
        raise CommandError(str(error), MODEL_FILES) from error
