"""Linear layers of packed bf16 weights beside oneDNN, for one row to thousands.

    python benchmarks/linear.py --json benchmarks/results/linear.jsonl
    python benchmarks/linear.py --rows 1152x3456 --seconds 0.5

Every call takes the next of several copies of the weight, together larger than the caches. oneDNN runs with weights as
they are and in the order that it prefers.
"""

# ruff: noqa: E402
from __future__ import annotations

import _isa

_isa.ensure_bf16()

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from _limits import measure_limits
from _measure import Bar, Peer, Row, append, compare, machine, parser, record, show
from torch import Tensor
from torch.nn.functional import linear

from kvkeye import ops
from kvkeye.layers.large_pages import LargePages

STREAMED = 200e6  # bytes of all copies
#: Inputs and outputs: the vision tower, Qwen3-0.6B, the 8B model.
SHAPES = ((1152, 3456), (1152, 4304), (4304, 1152), (1024, 4096), (3072, 1024), (4096, 6144))
BATCHES = (1, 8, 64, 512, 1024)


def over(weights: list[Any], product: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    following = cycle(weights)
    return lambda: product(next(following))


def agree(outputs: list[Tensor]) -> None:
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0].float(), other.float(), atol=0.05, rtol=0.02)


def linear_row(weights: list[Tensor], packed: list[Tensor], ordered: list[Tensor], rows: int) -> Row:
    outputs, inputs = weights[0].shape
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
    peers = [
        Peer("oneDNN", "weight as it is", over(weights, lambda w: linear(x, w))),
        Peer("oneDNN", "weight reordered", over(ordered, lambda w: pointwise(x, w))),
    ]
    factor = 1.0 if rows >= 512 else 1.5 if rows == 8 else 0.0
    few = rows == 1
    return Row(
        f"{rows} x {inputs} to {outputs}, bf16", peers, [Bar("oneDNN", factor)] if factor else [],
        over(packed, lambda w: ops.prepacked_linear(x, w, None, outputs)), agree,
        flops=2.0 * rows * weights[0].numel(), streamed=2.0 * weights[0].numel() if rows <= 8 else 0.0,
        least_read=0.9 if few else 0.0,
    )  # fmt: skip


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return found


def main() -> None:
    options = parser(__doc__, [f"{k}x{o}" for k, o in SHAPES], seconds=1.0)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    about = machine() | {"packages": {"torch": torch.__version__}, "quick": given.quick}
    limits = measure_limits(1 << (24 if given.quick else 30))
    print(f"{about}\n{limits}")
    for name in given.rows:
        inputs, outputs = (72, 40) if given.quick else map(int, name.split("x"))
        copies = 2 if given.quick else max(2, int(STREAMED / (2 * inputs * outputs)))
        weights = [torch.randn(outputs, inputs).mul(inputs**-0.5).bfloat16() for _ in range(copies)]
        memory = LargePages()  # as the layers keep them
        packed = [memory.copy(ops.pack_weight(w, 1, ops.values_per_word(w.dtype))) for w in weights]
        for rows in BATCHES[:2] if given.quick else BATCHES:
            with torch.inference_mode():
                ordered = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
                result = compare(linear_row(weights, packed, ordered, rows), 0.01 if given.quick else given.seconds)
            show(result, limits)
            append(given.json, about | limits.row() | record(result, limits))


if __name__ == "__main__":
    main()
