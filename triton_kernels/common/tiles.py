"""Tiles of the kernels that multiply matrices, per GPU: data, chosen by kernel, element and width, never by request.

`tiles/sm_<capability>.json` has, for each kernel, rows in order: the first whose `bits` (of an element) and `lanes` (of
a head, no limit where it is missing) suffice. A GPU takes the newest file that is not newer than itself.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent.parent / "tiles"
#: What the interpreter and tensors without a device take.
DEFAULT_CAPABILITY = 90


def known_capabilities() -> list[int]:
    """The GPUs that have a file, in ascending order."""
    return sorted(int(path.stem.removeprefix("sm_")) for path in _FOLDER.glob("sm_*.json"))


@functools.cache
def table(capability: int) -> dict[str, list[dict[str, int]]]:
    """Rows by kernel for a GPU of this compute capability, 90 for 9.0."""
    known = known_capabilities()
    chosen = max([c for c in known if c <= capability], default=known[0])
    rows: dict[str, list[dict[str, int]]] = json.loads((_FOLDER / f"sm_{chosen}.json").read_text())
    return rows


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(device: torch.device) -> int:
    """Compute capability of the device, 90 for 9.0."""
    if device.type != "cuda":
        return DEFAULT_CAPABILITY
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def tile_for(kernel: str, x: Tensor, lanes: int = 0) -> dict[str, int]:
    """Constants and launch options of `kernel` for elements of x's dtype and so many lanes."""
    bits = 16 if x.element_size() <= 2 else 32
    for row in table(capability_of(x.device))[kernel]:
        if row["bits"] >= bits and row.get("lanes", lanes) >= lanes:
            return {name: value for name, value in row.items() if name not in ("bits", "lanes")}
    raise LookupError(f"no tile of {kernel} for {x.dtype} and {lanes} lanes")
