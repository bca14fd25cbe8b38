"""`python -m kvkeye.train recipe.toml steps=100 optimizer.lr=1e-3`: trains a recipe with overrides."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from kvkeye.train.recipe import parse_overrides
from kvkeye.train.trainer import run

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run(Path(sys.argv[1]), parse_overrides(sys.argv[2:]))
