"""Sampling states and latents on disk: safetensors with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.steps import SamplingState


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replaces `path` in one step: a killed run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(ready, partial, metadata={"facts": json.dumps(facts)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `save_tensors`. Raises ConfigError where the file is none of ours."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
    except Exception as error:  # safetensors has errors of its own
        raise ConfigError(f"{path}: no saved state ({error}). Delete it to start anew.") from error


def save_state(path: Path, state: SamplingState, **facts: Any) -> None:
    """Writes a sampling state."""
    tensors = {f"returned/{i}": part for i, part in enumerate(state.returned)} | {
        "clean": state.clean.clone()
    }  # safetensors wants memory of its own
    if state.generator is not None:
        tensors["generator"] = state.generator
    plain: dict[str, Any] = {}
    for name, value in state.solver.items():
        if isinstance(value, list):
            plain[name] = [None if isinstance(item, Tensor) else item for item in value]
            tensors |= {f"solver/{name}/{i}": item for i, item in enumerate(value) if isinstance(item, Tensor)}
        elif isinstance(value, Tensor):
            tensors[f"solver/{name}"] = value
        else:
            plain[name] = value
    save_tensors(path, tensors, {"step": state.step, "shape": state.shape, "solver": plain, **facts})


def load_state(path: Path) -> tuple[SamplingState, dict[str, Any]]:
    """The state and the further facts that were saved with it. Raises ConfigError."""
    tensors, facts = load_tensors(path)
    solver: dict[str, Any] = facts.pop("solver")
    for name, value in tensors.items():
        parts = name.split("/")
        if parts[0] == "solver" and len(parts) == 3:
            solver[parts[1]][int(parts[2])] = value
        elif parts[0] == "solver":
            solver[parts[1]] = value
    count = sum(name.startswith("returned/") for name in tensors)
    returned = tuple(tensors[f"returned/{i}"] for i in range(count))
    generator = tensors.get("generator")
    state = SamplingState(
        facts.pop("step"), returned, solver, generator, tuple(facts.pop("shape")), tensors.get("clean", torch.empty(0))
    )
    return state, facts
