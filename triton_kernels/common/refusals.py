"""Sentences for calls that a launcher cannot take. A launcher's own stand beside it as `<launcher>_refuses`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: Read once: `triton.jit` decides at import between compiling and interpreting.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: The second and third axis of a CUDA grid.
MAX_GRID_YZ = 65535


def interpreted_bf16(*args: Any) -> Iterator[str]:
    """Refuses bf16 under Triton's interpreter, which holds bf16 as integers."""
    if INTERPRETED and any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in args):
        yield (
            "a tensor is bfloat16 and TRITON_INTERPRET=1; the interpreter truncates when it casts to bfloat16 and "
            "multiplies its bits as integers in dot products. Use float32 or float16, or run on a GPU"
        )


def too_wide(width: int, limit: int) -> Iterator[str]:
    """Refuses rows that do not fit the registers of one program."""
    if width > limit:
        yield f"rows hold {width} elements; this kernel keeps a row in registers and takes at most {limit}"
