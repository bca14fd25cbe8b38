"""Tolerance by yardstick: an implementation may err twice as much as the reference does in the working dtype.

Truth is the reference in float64. A comparison passes if, in the maximum and in the L2 norm,
|out - truth| <= 2 |naive - truth| + floor, floor = 4 eps |truth| with the eps of the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def mapped(function: Callable[[Tensor], Tensor], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`function` of every tensor among the arguments, those in lists too; everything else as it is."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(item) for item in value]
        return function(value) if isinstance(value, Tensor) else value

    return tuple(of(a) for a in args)


def widen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors in float64, everything else as it is; tensors are copied."""
    return mapped(lambda a: (a.double() if a.is_floating_point() else a).clone(), args)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return mapped(Tensor.clone, args)


def changed_arguments(op: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The arguments of a call that the op changes, by name; those that were left out are not there."""
    given = dict(zip(op.parameters, args))
    return {name: given[name] for name in op.mutates if given.get(name) is not None}


def reference_outputs(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an op's body gives, its contract unasked (float64 arguments break some); then the arguments it changed."""
    changed = tuple(changed_arguments(op, args).values())
    return tuple(r for r in as_tuple(op.reference(*args)) if r is not None) + changed


def assert_close(out: Tensor, naive: Tensor, truth: Tensor, what: str) -> None:
    """Raises AssertionError that names the worst place.

    Args:
        out: what the implementation returned.
        naive: the reference in the working dtype.
        truth: the reference in float64.
        what: names the row in the message.
    """
    assert out.shape == truth.shape, f"{what}: shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    assert out.dtype == naive.dtype, f"{what}: dtype {out.dtype}, expected {naive.dtype}"
    if not out.is_floating_point():
        assert torch.equal(out, naive), f"{what}: {int((out != naive).sum())} of {out.numel()} values differ"
        return
    truth = truth.double()
    finite = truth.isfinite()
    assert torch.equal(out.double()[~finite], truth[~finite]), f"{what}: non-finite values differ"
    if not bool(finite.any()):
        return
    eps = torch.finfo(out.dtype).eps
    error = (out.double() - truth)[finite]
    yard = (naive.double() - truth)[finite]
    exact = truth[finite]
    limit = 2 * float(yard.abs().max()) + 4 * eps * float(exact.abs().max())
    worst = int(error.abs().argmax())
    assert not bool(error.isnan().any()), f"{what}: NaN in {int(error.isnan().sum())} of {error.numel()} values"
    assert float(error.abs().max()) <= limit, (
        f"{what}: worst error {float(error.abs().max()):.3e} at flat index {worst} "
        f"(got {float(out.double()[finite][worst]):.6g}, truth {float(exact[worst]):.6g}), limit {limit:.3e}"
    )
    l2_limit = 2 * float(yard.norm()) + 4 * eps * float(exact.norm())
    assert float(error.norm()) <= l2_limit, f"{what}: L2 error {float(error.norm()):.3e}, limit {l2_limit:.3e}"
