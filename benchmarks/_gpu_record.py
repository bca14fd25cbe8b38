"""The rows of benchmarks/gpu.py: lines of JSON, written when they are done, with what they were measured on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
#: What decides a row: kernels as sources and as built, what calls them, and what compares.
CODE = (
    "kvkeye/**/*.py", "kvkeye/lib*.so", "triton_kernels/**/*.py", "triton_kernels/tiles/*.json", "benchmarks/_gpu*.py",
)  # fmt: skip


def fingerprint(root: Path = ROOT) -> str:
    """Of the code, committed or not, where git may be absent too."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in root.glob(pattern)}):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def provenance() -> dict[str, str]:
    """Code, commit and versions, as every row carries them."""

    def said(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "code": fingerprint(), "commit": said("git", "rev-parse", "--short", "HEAD"), "torch": torch.__version__,
        "triton": triton, "cuda": torch.version.cuda or "",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
    }  # fmt: skip


class Record:
    """Rows done on this device, kept in a file. What other code has shown is not done, unless it is kept.

    A row that is begun is named in a file beside it until it ends: whoever finds the name knows where a process died.
    """

    def __init__(self, path: Path, device: str, keeps_others: bool = False) -> None:
        self.path, self.device, self.origin = path, device, provenance()
        self.running = path.with_suffix(".running")
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [row for row in map(json.loads, lines) if row["device"] == device]
        self.rows = {row["key"]: row for row in rows if keeps_others or row["code"] == self.origin["code"]}

    def done(self, key: str) -> bool:
        """A row that failed is done only if it took its process along: repeated, it would do so again."""
        row = self.rows.get(key)
        return row is not None and (not row["status"].startswith("fail") or row.get("fatal", False))

    def begin(self, key: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.running.write_text(key)

    def add(self, key: str, status: str, **figures: Any) -> None:
        row = {"key": key, "device": self.device, "status": status, **figures, **self.origin}
        self.rows[key] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.running.unlink(missing_ok=True)

    def bury(self, why: str) -> None:
        """The process is gone; the row that it was in, if any, failed for good."""
        if self.running.exists():
            self.add(self.running.read_text(), f"fail: {why}", fatal=True)
