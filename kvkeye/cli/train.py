"""Trains a recipe to its last step, resuming where an earlier run stopped, and prints the folder of the checkpoint.

RECIPE is a TOML file, or the name of one that comes with the package (sft.toml). `name=value` changes an entry of it:
kvkeye train sft.toml steps=100 optimizer.lr=1e-3 output=runs/short
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvkeye.cli import exits
from kvkeye.cli.bundled import PACKAGE

RECIPES = PACKAGE / "train" / "recipes"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="changes of the recipe's entries")


def run(arguments: argparse.Namespace) -> int:
    path = recipe_path(arguments.recipe)
    from kvkeye.train.recipe import parse_overrides, read_toml

    overrides = parse_overrides(arguments.overrides)
    kind = read_toml(path).get("kind")
    if kind == "draft":
        from kvkeye.cli.answers import greedy_answers
        from kvkeye.train.heads.trainer import run as run_head

        print(run_head(path, greedy_answers, overrides))
        return exits.OK
    if kind == "video":
        from kvkeye.train.clips.trainer import run as run_video
        from kvkeye.video.attention import use_kvkeye_attention

        print(run_video(path, overrides, use_kvkeye_attention))
        return exits.OK
    import kvkeye.train

    print(kvkeye.train.run(path, overrides))
    return exits.OK


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises CommandError that lists the bundled ones."""
    path = Path(name).expanduser()
    for candidate in (path, RECIPES / name):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(file.name for file in RECIPES.glob("*.toml"))) or "none"
    raise exits.CommandError(
        f"recipe {name!r}: no such file; required is a TOML file or the name of a bundled recipe ({known}).",
        exits.USAGE,
    )
