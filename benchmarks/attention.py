"""Attention kernels beside PyTorch: prompts, training, decoding and verification, as rates and shares of the limits.

    python benchmarks/attention.py --json benchmarks/results/attention.jsonl
    python benchmarks/attention.py --rows decode_1x32k verify_8x32k

Outputs are compared before anything counts; the sides take turns; medians.
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
from _attention_rows import causal_row, decode_row, segments_row, training_row
from _limits import measure_limits
from _measure import Row, append, compare, machine, parser, record, show
from _vision_attention import attention_row

# One row is built at a time: caches are large. Called with quick.
ROWS: dict[str, Callable[[bool], Row]] = {
    "patches_5476": lambda quick: attention_row(64 if quick else 5476),
    "patches_1024": lambda quick: attention_row(64 if quick else 1024),
    "segments_64x64": lambda quick: segments_row(2 if quick else 64, 64),
    "causal_2048": lambda quick: causal_row(64 if quick else 2048, paged=False),
    "paged_2048": lambda quick: causal_row(64 if quick else 2048, paged=True),
    "training_bf16": lambda quick: training_row(64 if quick else 1024, torch.bfloat16),
    "training_fp32": lambda quick: training_row(64 if quick else 1024, torch.float32),
    "decode_1x32k": lambda quick: decode_row(1, 64 if quick else 32768, 1),
    "decode_8x4k": lambda quick: decode_row(8, 64 if quick else 4096, 1),
    "verify_2x32k": lambda quick: decode_row(1, 64 if quick else 32768, 2),
    "verify_8x32k": lambda quick: decode_row(1, 64 if quick else 32768, 8),
}


def main() -> None:
    given = parser(__doc__, list(ROWS), seconds=4.0).parse_args()
    torch.set_num_threads(given.threads)
    about: dict[str, Any] = machine() | {"packages": {"torch": version("torch")}, "quick": given.quick}
    limits = measure_limits(1 << (24 if given.quick else 28))
    print(f"{about}\n{limits}")
    for name in given.rows:
        torch.manual_seed(0)
        with torch.no_grad():
            row = ROWS[name](given.quick)
            row = replace(row, bars=[], least_vector=0.0, least_read=0.0) if given.quick else row
            result = compare(row, 0.05 if given.quick else given.seconds)
        show(result, limits)
        append(given.json, about | limits.row() | record(result, limits))


if __name__ == "__main__":
    main()
