"""From a photograph to vision features, beside torch, Pillow and transformers in the same process.

    python benchmarks/vision.py --json benchmarks/results/vision.jsonl
    python benchmarks/vision.py --rows tower_1036 --peers float32
    python benchmarks/vision.py --rows tower_1036 --profile

Outputs are compared before anything counts; the sides take turns; medians. The last two rows take a minute each.
"""

# ruff: noqa: E402
from __future__ import annotations

import _isa

_isa.ensure_bf16()

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from _limits import measure_limits
from _measure import Row, append, compare, machine, parser, record, show
from _vision_attention import attention_row
from _vision_packing import packing_row
from _vision_profile import print_profile
from _vision_tower import tower_row

# One row is built at a time: towers are large. Called with quick.
ROWS: dict[str, Callable[[bool], Row]] = {
    "pack_bicubic": lambda quick: packing_row(bilinear=False, quick=quick),
    "pack_bilinear": lambda quick: packing_row(bilinear=True, quick=quick),
    "attention_5476": lambda quick: attention_row(64 if quick else 5476),
    "tower_448": lambda quick: tower_row(448, quick),
    "tower_1036": lambda quick: tower_row(1036, quick),
}


def cut(row: Row, words: list[str], quick: bool) -> Row:
    """The row with the peers whose name has one of the words; without bars where shapes are tiny."""
    peers = [peer for peer in row.peers if not words or any(word in peer.name for word in words)]
    return replace(row, peers=peers, bars=[], least_vector=0.0) if quick else replace(row, peers=peers)


def main() -> None:
    options = parser(__doc__, list(ROWS), seconds=10.0)
    options.add_argument("--peers", nargs="*", default=[], help="only peers with one of these words in their name")
    options.add_argument("--profile", action="store_true", help="instead: where our side's time goes, by op")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    packages = {name: version(name) for name in ("torch", "pillow", "numpy", "transformers")}
    about: dict[str, Any] = machine() | {"packages": packages, "quick": given.quick}
    limits = measure_limits(1 << (24 if given.quick else 30))
    print(f"{about}\n{limits}")
    for name in given.rows:
        row = cut(ROWS[name](given.quick), given.peers, given.quick)
        with torch.inference_mode():
            if given.profile:
                print_profile(row.name, row.ours, limits)
                continue
            result = compare(row, 0.05 if given.quick else given.seconds)
        show(result, limits)
        append(given.json, about | limits.row() | record(result, limits))


if __name__ == "__main__":
    main()
