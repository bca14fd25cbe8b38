"""A backward op's arguments for a forward case, and their truth: the gradient of the forward's body in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvkeye.ops import Op
from kvkeye.testing.case import Case
from kvkeye.testing.compare import as_tuple, widen


def gradient_arguments(op: Op, case: Case, seed: int) -> tuple[Any, ...]:
    """Arguments of the backward op for one forward case: upstream gradients, saved inputs, saved outputs."""
    outputs = as_tuple(op.reference(*case.args))
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device) for o in outputs]
    by_name = dict(zip(op.parameters, case.args)) | {f"out_{i}": o.contiguous() for i, o in enumerate(outputs)}
    return (*grads, *[by_name[name] for name in op.saved])


def autograd_truth(op: Op, case: Case, backward_args: tuple[Any, ...]) -> list[Tensor | None]:
    """One per name in `op.gradients`; None for an argument that the case leaves out."""
    args = list(widen(case.args))
    places = [op.parameters.index(name) for name in op.gradients if args[op.parameters.index(name)] is not None]
    for place in places:
        args[place].requires_grad_()
    outputs = as_tuple(op.reference(*args))
    grads = [g.double() for g in backward_args[: len(outputs)]]
    kept = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in kept], [args[p] for p in places], [g for _, g in kept], allow_unused=True
    )
    by_place = dict(zip(places, found))
    return [
        None if args[p] is None else (torch.zeros_like(args[p]) if by_place[p] is None else by_place[p])
        for p in (op.parameters.index(name) for name in op.gradients)
    ]
