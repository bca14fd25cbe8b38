"""Data parallelism over processes of one machine: each makes its own batches, gradients are averaged.

The group is torch's own (gloo), met through a file beside the checkpoint, so no port is opened by name. With one
process nothing is started and every call is free.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(value: float) -> float:
    """The sum of a number over the processes."""
    if world_size() == 1:
        return value
    number = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(number)
    return float(number)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the processes; all must have the same parameters with gradients."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts: Sequence[Tensor] = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def launch(function: Callable[..., None], processes: int, *args: Any) -> None:
    """Runs `function(rank, *args)` in `processes` processes, rank 0 in this one. A failed process fails all."""
    if processes == 1:
        function(0, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_member, args=(function, rank, processes, meeting, torch.get_num_threads(), args))
            for rank in range(1, processes)
        ]
        for process in others:
            process.start()
        try:
            _member(function, 0, processes, meeting, torch.get_num_threads(), args)
        finally:
            for process in others:
                process.join(timeout=30)
                process.terminate()


def _member(
    function: Callable[..., None], rank: int, processes: int, meeting: str, threads: int, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
