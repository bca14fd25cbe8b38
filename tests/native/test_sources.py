"""Which headers each native folder may include."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNEL_HEADERS = {"cstdint", "cstring", "cmath", "math.h", "immintrin.h"}


def files(*folders: str) -> list[Path]:
    return [
        p for folder in folders for p in sorted((CSRC / folder).rglob("*")) if p.suffix in (".h", ".cpp", ".cu", ".cuh")
    ]


def included(path: Path) -> list[str]:
    return re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())


@pytest.mark.parametrize("path", files("torch"), ids=lambda p: p.name)
def test_bindings_use_the_stable_headers_only(path: Path) -> None:
    of_torch = [name for name in included(path) if name.startswith(("torch/", "ATen/", "c10/"))]
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in of_torch), of_torch


@pytest.mark.parametrize("path", files("include", "cpu"), ids=lambda p: str(p.relative_to(CSRC)))
def test_kernels_use_no_standard_containers(path: Path) -> None:
    """They are compiled once per instruction set; see csrc/README.md."""
    if path.name == "isa.cpp":
        return
    foreign = {name for name in included(path) if not name.startswith("kvkeye/") and "/" not in name}
    foreign -= KERNEL_HEADERS | {p.name for p in (CSRC / "cpu").glob("*.h")}
    assert not foreign
