"""Gradients belong to the op: every implementation is a plain forward function.

An op without a gradient raises when one is asked for, because PyTorch would only warn and let a Python
implementation leak the gradient of whatever it ran.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvkeye.ops._op import Op


_AUTOGRAD_KEYS = ("AutogradOther", "AutogradCPU", "AutogradCUDA")


def register(lib: torch.library.Library, op: "Op") -> None:
    """Gives `op` the gradient in `op.backward`, looked up when it is needed; without one, the call raises."""
    if op.mutates:
        lib.impl(op.name, _guard(op), "Autograd")
        return
    torch.library.register_autograd(f"kvkeye::{op.name}", _backward(op), setup_context=_save(op), lib=lib)


def _message(op: "Op") -> str:
    return (
        f"{op.name} has no gradient (inference only). Call it under torch.no_grad() or with tensors that do not "
        "require grad; training uses the ops marked b in the support table."
    )


def _guard(op: "Op") -> Callable[..., Any]:
    # register_autograd takes functional ops only; a kernel on the Autograd key does the same for the others.
    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(_message(op))
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload(*args)

    return autograd


def _save(op: "Op") -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if op.backward is None:
            raise RuntimeError(_message(op))
        results = output if isinstance(output, tuple) else (output,)
        by_name = dict(zip(op.parameters, inputs)) | {f"out_{i}": r for i, r in enumerate(results)}
        values = [by_name[name] for name in op.saved]
        ctx.places = [i for i, v in enumerate(values) if isinstance(v, Tensor)]
        ctx.plain = [None if isinstance(v, Tensor) else v for v in values]
        ctx.save_for_backward(*[values[i] for i in ctx.places])

    return setup_context


def _backward(op: "Op") -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert op.backward is not None
        values = list(ctx.plain)
        for place, tensor in zip(ctx.places, ctx.saved_tensors):
            values[place] = tensor
        found = op.backward(*grads, *values)
        by_name = dict(zip(op.gradients, found if isinstance(found, tuple) else (found,)))
        return tuple(by_name.get(n) if need else None for n, need in zip(op.parameters, ctx.needs_input_grad))

    return backward


def generate(op: "Op", gradients: tuple[str, ...], outputs: tuple[str, ...]) -> "Op":
    """The op `<name>_backward`, whose reference differentiates the body of `op`.

    Arguments: one gradient per output of `op`, the arguments of `op`, then its outputs named in `outputs`.
    """
    from kvkeye.ops._op import declare

    num_outputs = op.schema.partition("->")[2].count("Tensor")
    grads = [f"grad_{i}" for i in range(num_outputs)] if num_outputs > 1 else ["grad"]

    def reference(*args: Any) -> Any:
        upstream, inputs = args[: len(grads)], list(args[len(grads) : len(grads) + len(op.parameters)])
        return _differentiate_body(op, gradients, upstream, inputs)

    reference.__name__ = f"{op.name}_backward"
    reference.__qualname__ = reference.__name__
    reference.__module__ = op.reference.__module__
    reference.__doc__ = f"Gradients of {op.name} with respect to {', '.join(gradients)}; fp32 sums."
    names = [*grads, *op.parameters, *outputs]
    reference.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    )
    declared = declare(reference, _backward_schema(op, grads, gradients, outputs), (), None)
    positions = [len(grads) + op.parameters.index(g) for g in gradients]
    declared.fake(lambda *args: _like([args[i] for i in positions]))
    return declared


def _backward_schema(op: "Op", grads: Sequence[str], gradients: Sequence[str], outputs: Sequence[str]) -> str:
    arguments = op.schema.partition("->")[0].strip()[1:-1]
    parts = [f"Tensor {g}" for g in grads] + [arguments] + [f"Tensor {o}" for o in outputs]
    result = "Tensor" if len(gradients) == 1 else "(" + ", ".join(["Tensor"] * len(gradients)) + ")"
    return f"({', '.join(parts)}) -> {result}"


def _differentiate_body(op: "Op", gradients: Sequence[str], upstream: Sequence[Tensor], inputs: list[Any]) -> Any:
    positions = [op.parameters.index(g) for g in gradients]
    # Widened first: the sums of a gradient are held in fp32 (or fp64) whatever the working dtype.
    given = [wide(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in inputs]

    def body(*differentiated: Tensor) -> Any:
        for position, value in zip(positions, differentiated):
            given[position] = value
        return op.reference(*given)

    # torch.func brings its own autograd: the ordinary one is switched off inside a kernel.
    result, pull = torch.func.vjp(body, *(given[p] for p in positions))  # type: ignore[misc]  # annotated with the has_aux form
    results = result if isinstance(result, tuple) else (result,)
    cotangents = tuple(g.to(r.dtype) for r, g in zip(results, upstream))
    found = pull(cotangents if isinstance(result, tuple) else cotangents[0])
    out = tuple(g.to(inputs[p].dtype) for g, p in zip(found, positions))
    return out[0] if len(out) == 1 else out


def _like(tensors: Sequence[Tensor]) -> Any:
    made = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors)
    return made[0] if len(made) == 1 else made


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype in which sums are held: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()
