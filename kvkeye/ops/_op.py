"""The op layer: one typed declaration per op, its body being the reference.

`@op` turns a function into a torch op `kvkeye::name`. The schema comes from the annotations, the body is the
`eager` implementation and the fake tensor rule. `implement` adds leaves that know nothing of each other,
`differentiate` attaches a gradient, `explain` says which implementation would run and why the others would not.

Two promises hold for every implementation: outputs are freshly allocated and contiguous, and every element of
them is written. Declarations must not use postponed annotations: the schema is read from them.
"""

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from kvkeye.errors import UnsupportedError
from kvkeye.ops import _library, _policy

_log = logging.getLogger("kvkeye.ops")
_LIB = torch.library.Library("kvkeye", "DEF")

Reasons = Callable[..., Iterator[str]]
#: Every declared op by name, in order of declaration. Filled by `@op` only.
OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. `call` is resolved at first use; `refuses` yields sentences.

    dtypes   what it computes on
    storage  further dtypes of arguments: quantised values, and their scales
    """

    op: str
    name: str
    dtypes: tuple[torch.dtype, ...]
    refuses: Reasons | None = None
    target: str | None = None
    storage: tuple[torch.dtype, ...] = ()

    def absent(self) -> str | None:
        """Why this implementation cannot exist on this machine, or None."""
        if self.name == "triton":
            return _library.triton_reason()
        if self.target is not None:
            return _library.gpu_reason()
        return _library.native_reason(self.name, self.op)

    @functools.cached_property
    def call(self) -> Callable[..., Any]:
        if self.target is None:
            return _library.native_op(self.name, self.op)
        module, function = self.target.split(":")
        package = "kvkeye.triton_kernels" if self.name == "triton" else "kvkeye.ops"
        found: Callable[..., Any] = getattr(importlib.import_module(f"{package}.{module}"), function)
        return found

    def reasons(self, tensors: Sequence[Tensor], args: Sequence[Any]) -> Iterator[str]:
        """Sentences that say why this call cannot run here; none if it can."""
        if (reason := self.absent()) is not None:
            yield reason
            return
        yield from self._placement(tensors)
        if self.refuses is not None:
            yield from self.refuses(*args)

    def _placement(self, tensors: Sequence[Tensor]) -> Iterator[str]:
        for tensor in tensors:
            on_cpu = tensor.device.type == "cpu"
            if self.name == "cpp" and not on_cpu:
                yield f"a tensor is on {tensor.device}; cpp runs on the CPU"
                return
            if self.name == "cuda" and on_cpu:
                yield "a tensor is on the CPU; cuda runs on a GPU"
                return
            if self.name == "triton" and on_cpu and not _library.triton_interprets():
                yield "a tensor is on the CPU; Triton needs a GPU or TRITON_INTERPRET=1"
                return
            if tensor.is_floating_point() and tensor.dtype not in (*self.dtypes, *self.storage):
                names = ", ".join(str(d).removeprefix("torch.") for d in (*self.dtypes, *self.storage))
                yield f"a tensor is {str(tensor.dtype).removeprefix('torch.')}; {self.name} takes {names}"
                return


@dataclass
class Op:
    """A declared op. Calling it goes through `torch.ops.kvkeye.<name>`."""

    name: str
    family: str
    reference: Callable[..., Any]
    schema: str
    mutates: tuple[str, ...]
    parameters: tuple[str, ...]
    requires: Reasons | None
    implementations: dict[str, Implementation] = field(default_factory=dict)
    backward: "Op | None" = None
    gradients: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    overload: Any = None
    #: What `select` found, where it follows from the specifications in force and the tensors' places and dtypes.
    chosen: dict[Any, Implementation] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        # torch.compile can't trace a context variable.
        settled = None if torch.compiler.is_compiling() else _policy.settled.get()
        if settled is None:
            return self.overload(*args)
        if (kernel := settled.get(self.name)) is None:
            return self._first_call(settled, args)
        return kernel(*args)

    def _first_call(self, settled: dict[str, Callable[..., Any]], args: Sequence[Any]) -> Any:
        self.check(*args)
        name, call = self.select(*args)
        if name == "cpp" and self.implementations[name].refuses is None:
            settled[self.name] = call
        return self.overload(*args)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.reference.__doc__

    def implement(
        self,
        name: str,
        target: str | None = None,
        *,
        refuses: Reasons | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        storage: Sequence[torch.dtype] = (),
    ) -> None:
        """Adds an implementation. `target` is "module:function" below `kvkeye.triton_kernels`, or for "cuda" below
        `kvkeye.ops`, where a library does it; without one it is the kernel of the op's name in the compiled library.

        A launcher's own refusals stand beside it as `<function>_refuses` and are found by that name.
        """
        if name == "triton":
            default: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
            refuses = refuses or functools.partial(_launcher_reasons, target or "")
        else:
            default = (torch.float32, torch.bfloat16)
        self.chosen.clear()
        self.implementations[name] = Implementation(
            self.name, name, tuple(dtypes) if dtypes else default, refuses, target, tuple(storage)
        )

    def check(self, *args: Any) -> None:
        """Raises ValueError with every broken term of the contract."""
        if self.requires is None:
            return
        broken = list(self.requires(*args))
        if broken:
            raise ValueError(f"{self.name}: " + "; ".join(broken))

    def select(self, *args: Any) -> tuple[str, Callable[..., Any]]:
        """Name and function of the implementation that this call runs."""
        tensors = _tensors(args)
        key = _policy.specifications(), *((t.is_cpu, t.dtype) for t in tensors)
        if (known := self.chosen.get(key)) is not None:
            return known.name, known.call
        order = _policy.order(self.family, self.name, tensors[0].device.type if tensors else "cpu")
        for name in order.names:
            implementation = self.implementations.get(name)
            if name == "eager":
                call = self.reference
            elif implementation is not None and not any(implementation.reasons(tensors, args)):
                call = implementation.call
            else:
                continue
            _policy.note(self.name, name, tensors)
            if name == "cpp" == order.names[0] and implementation is not None and implementation.refuses is None:
                self.chosen[key] = implementation
            return name, call
        raise UnsupportedError(f"no implementation accepts this call\n{self.explain(*args)}")

    def order(self, device: str) -> tuple[str, ...]:
        """The implementations that calls on `device` may run, the first choice first."""
        return _policy.order(self.family, self.name, device).names

    def first_choice(self, device: str) -> tuple[str, list[str]]:
        """The implementation that calls on `device` try first, and why those before it in the order are passed over.

        Where no GPU is visible, what a machine with one would run: an implementation counts if it is declared.
        """
        passed: list[str] = []
        for name in self.order(device):
            here = device == "cpu" or torch.cuda.is_available()
            reasons = list(self._reasons(name, (), ())) if here or name not in self.implementations else []
            if not reasons:
                return name, passed
            passed.append(f"{name}: {'; '.join(reasons)}")
        return "none", passed

    def explain(self, *args: Any) -> str:
        """The order in force and, per implementation, whether it runs or why it refuses."""
        tensors = _tensors(args)
        order = _policy.order(self.family, self.name, tensors[0].device.type if tensors else "cpu")
        lines = [f"kvkeye::{self.name}   order: {', '.join(order.names)}   (from {order.source})"]
        chosen = False
        for name in order.names:
            reasons = list(self._reasons(name, tensors, args))
            verdict = f"refuses: {'; '.join(reasons)}" if reasons else "accepts" if chosen else "runs"
            chosen = chosen or not reasons
            lines.append(f"  {name:<7} {verdict}")
        return "\n".join(lines)

    def _reasons(self, name: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> Iterator[str]:
        if name == "eager":
            return
        implementation = self.implementations.get(name)
        if implementation is None:
            yield f"{self.name} has no {name} implementation"
        elif args:
            yield from implementation.reasons(tensors, args)
        elif (reason := implementation.absent()) is not None:
            yield reason

    def run(self, *args: Any) -> Any:
        """What the dispatcher calls: contract, choice, call."""
        self.check(*args)
        name, call = self.select(*args)
        result = call(*args)
        return _owned(result) if name == "eager" else result

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Replaces the body as the rule for shapes; needed where the body reads values."""
        torch.library.register_fake(f"kvkeye::{self.name}", function, lib=_LIB, allow_override=True)
        return function

    def differentiate(
        self,
        *gradients: str,
        backward: "Op | None" = None,
        save: Sequence[str] | None = None,
        outputs: Sequence[str] = (),
    ) -> "Op":
        """Attaches a gradient with respect to the inputs named in `gradients`.

        The backward op takes the gradients of all outputs, then the arguments named in `save` (all of them by
        default), then the saved outputs; it returns one gradient per name. Without `backward` it is generated:
        its reference differentiates this op's body.
        """
        from kvkeye.ops import _autograd

        self.gradients = gradients
        self.saved = (*(self.parameters if save is None else save), *outputs)
        self.backward = backward or _autograd.generate(self, gradients, tuple(outputs))
        return self.backward


@overload
def op(function: Callable[..., Any]) -> Op: ...


@overload
def op(*, mutates: Sequence[str] = (), requires: Reasons | None = None) -> Callable[[Callable[..., Any]], Op]: ...


def op(
    function: Callable[..., Any] | None = None,
    *,
    mutates: Sequence[str] = (),
    requires: Reasons | None = None,
) -> Op | Callable[[Callable[..., Any]], Op]:
    """Declares a torch op from a typed function whose docstring is the contract and whose body is the reference."""
    if function is None:
        return lambda f: declare(
            f, torch.library.infer_schema(f, mutates_args=tuple(mutates)), tuple(mutates), requires
        )
    schema = torch.library.infer_schema(function, mutates_args=tuple(mutates))
    return declare(function, schema, tuple(mutates), requires)


def declare(function: Callable[..., Any], schema: str, mutates: tuple[str, ...], requires: Reasons | None) -> Op:
    """Defines `kvkeye::<function name>` with this schema and body."""
    name = function.__name__
    parameters = tuple(inspect.signature(function).parameters)
    family = function.__module__.rpartition(".")[2]
    declared = Op(name, family, function, schema, mutates, parameters, requires)
    _LIB.define(name + schema)
    _LIB.impl(name, declared.run, "CompositeExplicitAutograd")
    declared.overload = getattr(torch.ops.kvkeye, name).default
    torch.library.register_fake(
        f"kvkeye::{name}", lambda *args: _owned(declared.reference(*args)), lib=_LIB, allow_override=True
    )
    from kvkeye.ops import _autograd

    _autograd.register(_LIB, declared)
    OPS[name] = declared
    return declared


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among the arguments, those in lists too."""
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += [item for item in argument if isinstance(item, Tensor)]
    return found


def _owned(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.contiguous()
    return tuple(r.contiguous() for r in result) if isinstance(result, tuple) else result


def _launcher_reasons(target: str, *args: Any) -> Iterator[str]:
    module, function = target.split(":")
    leaf = importlib.import_module(f"kvkeye.triton_kernels.{module}")
    reasons = getattr(leaf, f"{function}_refuses", None)
    if reasons is not None:
        yield from reasons(*args)
