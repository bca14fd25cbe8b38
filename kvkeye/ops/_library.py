"""Finds and loads the compiled libraries, or keeps the reason why it cannot.

Order matters: with the stable ABI a library registers its kernels without a schema; it is loaded first, and the
schemas of `kvkeye_cpu` and `kvkeye_cuda` are defined second, from the same string as the public op's.
"""

import ctypes
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_NAMESPACE = {"cpp": "kvkeye_cpu", "cuda": "kvkeye_cuda"}
_KEY = {"cpp": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Native:
    """One compiled library: where it is, or why it is not."""

    path: Path | None
    reason: str | None


def build_info() -> dict[str, Any]:
    """What the build recorded: compilers, instruction sets, reasons for what was left out."""
    path = _PACKAGE / "_build_info.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


@functools.cache
def native(name: str) -> Native:
    """Loads the library of `cpp` or `cuda` once."""
    path = _PACKAGE / f"lib{_NAMESPACE[name]}.so"
    if not path.is_file():
        why = build_info().get(f"{name}_reason", "it was not built; reinstall kvkeye with a C++ compiler at hand")
        return Native(None, f"{path.name} is absent: {why}")
    if name == "cuda":
        if (reason := gpu_reason()) is not None:
            return Native(None, reason)
        # The stable ABI's device shims live in libtorch_cuda; they must be visible to a library linked without it.
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Native(None, f"{path.name} does not load: {error}")
    _define_schemas(name)
    return Native(path, None)


def _define_schemas(name: str) -> None:
    from kvkeye.ops._op import OPS

    library = torch.library.Library(_NAMESPACE[name], "FRAGMENT")
    for op in OPS.values():
        if name in op.implementations and op.implementations[name].target is None:
            # The stable ABI passes plain integers.
            library.define(op.name + op.schema.replace("SymInt", "int"))
    _KEEP.append(library)


_KEEP: list[torch.library.Library] = []


def gpu_reason() -> str | None:
    """Why nothing can run on a GPU, or None."""
    return None if torch.cuda.is_available() else "no GPU is visible to torch"


@functools.cache
def native_reason(name: str, op: str) -> str | None:
    """Why `op` has no compiled kernel, or None."""
    library = native(name)
    if library.reason is not None:
        return library.reason
    qualified = f"{_NAMESPACE[name]}::{op}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, _KEY[name]):
        return f"lib{_NAMESPACE[name]}.so holds no kernel {op}"
    return None


def native_op(name: str, op: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(getattr(torch.ops, _NAMESPACE[name]), op).default
    return found


@functools.cache
def triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install 'kvkeye[triton]')"
    if "kvkeye.triton_kernels" not in sys.modules and importlib.util.find_spec("kvkeye.triton_kernels") is None:
        return "kvkeye.triton_kernels is not importable; install the package (pip install -e .)"
    return None


def triton_interprets() -> bool:
    """Whether Triton was told to run on the CPU by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
