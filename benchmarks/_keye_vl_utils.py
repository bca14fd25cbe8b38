"""The family's published client package, in the versions that `make peers` installed side by side.

    utils = load("1.5.2")
    utils.smart_resize(768, 1365, ...)

Its torchvision is the published one. On a CPU build of torch the compiled half of torchvision does not load and its
import stops at two operators that it would have brought; naming them is enough for the Python half, which is
what the package calls.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

VERSIONS = ("1.5.2", "1.0.0")
PEERS = Path(__file__).resolve().parents[1] / ".peers"

_library: torch.library.Library | None = None


def is_installed(version: str) -> bool:
    return all(folder.is_dir() for folder in _folders(version))


def load(version: str) -> ModuleType:
    """`keye_vl_utils.vision_process` of this version; one version per process, they share a name."""
    if not is_installed(version):
        raise RuntimeError(f"keye-vl-utils {version}: not in {PEERS.name}/; run `make peers`.")
    if (other := sys.modules.get("keye_vl_utils")) is not None and version not in str(other.__file__):
        raise RuntimeError(f"keye-vl-utils {version}: another version is imported; use a process of its own.")
    _name_operators()
    # Behind everything else: what the environment has wins over the copies brought along.
    sys.path.extend(str(folder) for folder in _folders(version) if str(folder) not in sys.path)
    return importlib.import_module("keye_vl_utils.vision_process")


def _folders(version: str) -> tuple[Path, Path]:
    return PEERS / f"keye-vl-utils-{version}", PEERS / "keye-vl-utils-deps"


def _name_operators() -> None:
    global _library
    if _library is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
