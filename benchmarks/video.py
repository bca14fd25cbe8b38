"""The ops of long videos, beside the tensor code of the published methods and torch's attention.

    python benchmarks/video.py --json benchmarks/results/video.jsonl
    python benchmarks/video.py --rows fuse blend_gaussian

Outputs are compared before anything counts; the sides take turns; medians. FLOPs of tile_attention are those of each
pair of frames that share a tile, once.
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
from _video_attention import attention_row
from _video_fusion import blend_row, fuse_row, score_row

ROWS: dict[str, Callable[[bool], Row]] = {
    "fuse": fuse_row,
    "blend_gaussian": lambda quick: blend_row(0, quick),
    "blend_butterworth": lambda quick: blend_row(4, quick),
    "attention_fp32": lambda quick: attention_row(torch.float32, quick),
    "attention_bf16": lambda quick: attention_row(torch.bfloat16, quick),
    "score": score_row,
}


def main() -> None:
    given = parser(__doc__, list(ROWS), seconds=5.0).parse_args()
    torch.set_num_threads(given.threads)
    about: dict[str, Any] = machine() | {"packages": {"torch": version("torch")}, "quick": given.quick}
    limits = measure_limits(1 << (24 if given.quick else 30))
    print(f"{about}\n{limits}")
    for name in given.rows:
        row = ROWS[name](given.quick)
        if given.quick:
            row = replace(row, bars=[])
        with torch.inference_mode():
            result = compare(row, 0.05 if given.quick else given.seconds)
        show(result, limits)
        append(given.json, about | limits.row() | record(result, limits))


if __name__ == "__main__":
    main()
