"""Makes torch's bf16 products work where the CPU announces AMX tiles that oneDNN then cannot use. Imports no torch.

On such machines torch's own bf16 `linear` dies with an illegal instruction. A benchmark whose peers multiply bf16
calls `ensure_bf16()` before it imports torch; that tries one product in a child process and, if the child dies, limits
oneDNN to the best instruction set that lives.

MKL's own tile kernels do work there, and attention in bf16 runs on them. With `--no-tiles` no library of torch's side
uses tiles: the comparison as a CPU without them would see it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "ONEDNN_MAX_CPU_ISA"
FALLBACKS = ("AVX512_CORE_FP16", "AVX512_CORE_BF16", "AVX2")
# Without tiles MKL's bf16 product is fastest when it widens to fp32: AVX512_E3, with bf16 dot products, is slower.
NO_TILES = {VARIABLE: "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512_E2"}
_PROBE = "import torch; x = torch.ones(256, 256).bfloat16(); assert (x @ x).sum() > 0"


def ensure_bf16() -> str:
    """Sets the variable for this process if it must; returns what is in force ("" for no limit)."""
    if "torch" in sys.modules:
        raise RuntimeError("ensure_bf16: torch is imported already; call it before.")
    if "--no-tiles" in sys.argv:
        os.environ |= NO_TILES
        print(f"no tiles on torch's side: {NO_TILES}", file=sys.stderr)
    if VARIABLE in os.environ or not _announces_tiles():
        return os.environ.get(VARIABLE, "")
    if _works(""):
        return ""
    for name in FALLBACKS:
        if _works(name):
            os.environ[VARIABLE] = name
            message = f"AMX is announced, but torch's bf16 product dies on it: set {VARIABLE}={name} for torch's side"
            print(message, file=sys.stderr)
            return name
    return ""


def _announces_tiles() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "amx_bf16" in flags.read_text()


def _works(name: str) -> bool:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({VARIABLE: name} if name else {})}
    return subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, check=False).returncode == 0
