"""Every (op, implementation, case, dtype) of the case table: values, gradients, opcheck, views, refusals, bits.

A row that an implementation refuses is recorded with its sentence; a cell that a machine cannot have (no GPU, no
compiler) is a skip with the reason in words.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.errors import UnsupportedError
from kvkeye.ops import Op
from kvkeye.testing.case import FAMILIES, Case, Sample, bad, good
from kvkeye.testing.compare import (
    as_tuple,
    assert_close,
    changed_arguments,
    copied,
    mapped,
    reference_outputs,
    widen,
)
from kvkeye.testing.gradients import autograd_truth, gradient_arguments

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD = [op for op in ops.OPS.values() if good(op.name, Sample(torch.float32))]
BACKWARD = {op.backward.name: op for op in FORWARD if op.backward is not None}


def implementations(op: Op) -> list[str]:
    return ["eager", *op.implementations]


def dtypes_of(op: Op, implementation: str) -> list[str]:
    if implementation == "eager":
        return ["fp32", "bf16"]
    return [name for name, dtype in DTYPES.items() if dtype in op.implementations[implementation].dtypes]


def cells() -> Iterator[Any]:
    for op in FORWARD:
        for implementation in implementations(op):
            for dtype in dtypes_of(op, implementation):
                yield pytest.param(op, implementation, dtype, id=f"{op.name}-{implementation}-{dtype}")


def backward_cells() -> Iterator[Any]:
    for name, op in BACKWARD.items():
        backward = ops.OPS[name]
        for implementation in implementations(backward):
            for dtype in dtypes_of(backward, implementation):
                yield pytest.param(op, implementation, dtype, id=f"{name}-{implementation}-{dtype}")


def available(op: Op, implementation: str) -> None:
    """Skips, with the reason, what this machine cannot have."""
    if implementation != "eager" and (reason := op.implementations[implementation].absent()) is not None:
        pytest.skip(f"{op.name} has no {implementation} here: {reason}")


def run_rows(
    op: Op, implementation: str, dtype: str, body: Callable[[Case, str], bool | None], only_small: bool
) -> int:
    """Runs `body` for every case that the implementation accepts; returns how many there were.

    A body returns False where it met a refusal of its own.
    """
    accepted = 0
    for device in DEVICES:
        big = not only_small and (implementation == "cpp" or device == "cuda")
        for case in good(op.name, Sample(DTYPES[dtype], device, big=big)):
            if implementation == "triton" and device == "cpu" and not case.small:
                continue
            if not accepts(op, implementation, case.args):
                sentences = ops.OPS[op.name].implementations[implementation].reasons
                assert list(sentences(tensors_of(case.args), case.args)), "a refusal must give its reason"
                assert implementation not in case.must_accept, f"{implementation} must accept {op.name} {case.id}"
                continue
            accepted += body(case, f"{op.name} {implementation} {dtype} {device} {case.id}") is not False
    return accepted


def accepts(op: Op, implementation: str, args: tuple[Any, ...]) -> bool:
    if implementation == "eager":
        return True
    return not list(op.implementations[implementation].reasons(tensors_of(args), args))


def tensors_of(args: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda tensor: found.append(tensor) or tensor, args)
    return found


def begin(request: pytest.FixtureRequest, op: Op, implementation: str) -> None:
    """Names the cell for the table at the end of the run; skips, with the reason, what this machine cannot have."""
    request.node.user_properties.append(("cell", f"{op.name}/{implementation}"))
    available(op, implementation)


def finish(request: pytest.FixtureRequest, accepted: int) -> None:
    request.node.user_properties.append(("outcome", "passed" if accepted else "refused"))


def call(op: Op, implementation: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's results followed by the arguments it mutates."""
    with ops.use_backends(implementation):
        result = op(*args)
    mutated = tuple(changed_arguments(op, args).values())
    return tuple(r for r in as_tuple(result) if r is not None) + mutated


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Any NaN equals any other."""
    if a.dtype == torch.float8_e4m3fn:  # torch compares no such tensors
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every `empty`, in C++ too, comes filled with NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("op", "implementation", "dtype"), list(cells()))
def test_values(op: Op, implementation: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Values against float64 truth, with memory poisoned, so an unwritten output is a NaN; two runs, equal bits."""
    begin(request, op, implementation)

    def body(case: Case, what: str) -> None:
        naive = reference_outputs(op, copied(case.args))
        truth = reference_outputs(op, widen(case.args)) if op.name != "sample" else naive
        with poisoned_memory():
            out = call(op, implementation, copied(case.args))
        again = call(op, implementation, copied(case.args))
        for i, (o, a, n, t) in enumerate(zip(out, again, naive, truth, strict=True)):
            assert o.is_contiguous(), f"{what}: output {i} is not contiguous"
            assert_close(o, n, t, f"{what} output {i}")
            assert same_bits(o, a), f"{what}: two runs differ in output {i}"

    accepted = run_rows(op, implementation, dtype, body, only_small=False)
    finish(request, accepted)


@pytest.mark.parametrize(("op", "implementation", "dtype"), list(backward_cells()))
def test_backward_values(op: Op, implementation: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Each backward op against the gradient of the forward's body in float64."""
    backward = op.backward
    assert backward is not None
    begin(request, backward, implementation)

    def body(case: Case, what: str) -> bool:
        args = gradient_arguments(op, case, seed=1)
        if not accepts(backward, implementation, args):
            assert implementation not in case.must_accept, f"{implementation} must accept {backward.name} {case.id}"
            return False
        truth = autograd_truth(op, case, args)
        naive = as_tuple(backward.reference(*copied(args)))
        with poisoned_memory():
            out = call(backward, implementation, copied(args))
        again = call(backward, implementation, copied(args))
        for name, o, a, n, t in zip(op.gradients, out, again, naive, truth, strict=True):
            if t is None:
                continue
            assert_close(o, n, t, f"{what} gradient of {name}")
            assert torch.equal(o, a), f"{what}: two runs differ in the gradient of {name}"
        return True

    accepted = run_rows(op, "eager", dtype, body, only_small=True)
    finish(request, accepted)


SMALLEST = {
    "varlen_attention": 4, "packed_linear": 5, "interpolate_position": 0, "qk_norm_mrope": 0, "rms_norm": 0,
}  # fmt: skip


@pytest.mark.parametrize("op", [op for op in FORWARD if op.backward is not None], ids=lambda op: op.name)
def test_gradcheck(op: Op) -> None:
    """The public op's autograd in float64 against finite differences, on one small case."""
    case = good(op.name, Sample(torch.float64))[SMALLEST.get(op.name, 0)]
    args = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in case.args]
    places = [op.parameters.index(name) for name in op.gradients if args[op.parameters.index(name)] is not None]
    for place in places:
        args[place] = args[place].clone().requires_grad_()

    def function(*inputs: Tensor) -> Any:
        given = list(args)
        for place, value in zip(places, inputs):
            given[place] = value
        return op(*given)

    assert torch.autograd.gradcheck(function, tuple(args[p] for p in places), atol=1e-5, fast_mode=True)


def views(op: Op, args: tuple[Any, ...], kind: str) -> list[Any]:
    """The arguments with all tensors of several dimensions behind other strides, except those that the op mutates."""
    copies = copied(args)
    strides = mapped(lambda tensor: strided(tensor, kind) if tensor.dim() > 1 else tensor, copies)
    given = zip(op.parameters, copies, strides)  # trailing arguments may be left out
    return [copy if name in op.mutates else view for name, copy, view in given]


def strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values behind other strides."""
    if kind == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), 77, dtype=tensor.dtype, device=tensor.device)
        view = wide[..., 2 : 2 + tensor.shape[-1]]
    else:
        view = torch.empty(tensor.shape[::-1], dtype=tensor.dtype, device=tensor.device).permute(
            *reversed(range(tensor.dim()))
        )
    return view.copy_(tensor)


@functools.cache
def case_for_check(name: str) -> Case:
    return good(name, Sample(torch.float32))[min(1, len(good(name, Sample(torch.float32))) - 1)]


@pytest.mark.parametrize("kind", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("op", FORWARD, ids=lambda op: op.name)
def test_opcheck(op: Op, kind: str) -> None:
    """Schema, autograd registration, fake strides and AOT dispatch, by PyTorch's own checker."""
    args = list(copied(case_for_check(op.name).args))
    if kind != "contiguous":
        args = views(op, tuple(args), kind)
    for i, name in enumerate(op.parameters):
        if name in op.gradients and isinstance(args[i], Tensor):
            args[i].requires_grad_()
    torch.library.opcheck(op.overload, tuple(args))


@pytest.mark.parametrize("name", ["append_kv", "qk_norm_mrope_append", "paged_attention"])
def test_opcheck_with_fp8_caches(name: str) -> None:
    """All but the test that multiplies every argument, which PyTorch cannot for FP8."""
    case = next(case for case in good(name, Sample(torch.float32)) if case.id.startswith("fp8"))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.OPS[name].overload, copied(case.args), test_utils=checks)


@pytest.mark.parametrize("kind", ["sliced", "transposed"])
@pytest.mark.parametrize(("op", "implementation", "dtype"), list(cells()))
def test_views(op: Op, implementation: str, dtype: str, kind: str) -> None:
    """A view gives the bits of its contiguous copy, or a refusal; never another answer."""
    available(op, implementation)

    def body(case: Case, what: str) -> None:
        try:
            out = call(op, implementation, tuple(views(op, case.args, kind)))
        except UnsupportedError:
            assert implementation in ("triton", "cuda"), f"{what}: {implementation} takes views"
            return
        if implementation == "eager":  # torch picks its kernels by stride
            naive = reference_outputs(op, copied(case.args))
            truth = reference_outputs(op, widen(case.args)) if op.name != "sample" else naive
            for o, n, t in zip(out, naive, truth, strict=True):
                assert_close(o, n, t, what)
            return
        for o, e in zip(out, call(op, implementation, copied(case.args)), strict=True):
            assert same_bits(o, e), f"{what}: a {kind} view gives another answer"

    run_rows(op, implementation, dtype, body, only_small=True)


@pytest.mark.parametrize("implementation", ["eager", "cpp"])
@pytest.mark.parametrize("op", [op for op in FORWARD if op.mutates], ids=lambda op: op.name)
def test_writes_stay_inside(op: Op, implementation: str) -> None:
    """Memory before and after a mutated argument is untouched."""
    available(op, implementation)
    for case in good(op.name, Sample(torch.float32)):
        if not accepts(op, implementation, case.args):
            continue
        args, guards = list(copied(case.args)), []
        for name in changed_arguments(op, case.args):
            place = op.parameters.index(name)
            buffer = torch.full((args[place].numel() + 128,), 112.0).to(args[place].dtype)
            inside = buffer[64:-64].view(args[place].shape)
            inside.copy_(args[place])
            args[place] = inside
            guards.append(buffer)
        call(op, implementation, tuple(args))
        for buffer in guards:
            around = torch.cat((buffer[:64], buffer[-64:])).float()
            assert bool((around == 112).all()), f"{op.name} {case.id}"


@pytest.mark.parametrize("op", ops.OPS.values(), ids=lambda op: op.name)
def test_broken_contract(op: Op) -> None:
    """Every broken call raises ValueError with its sentence, before any work."""
    for row in bad(op.name, Sample(torch.float32)):
        with pytest.raises(ValueError) as caught:
            op(*row.args)
        assert row.says in str(caught.value), f"{row.id}: {caught.value}"
        assert str(caught.value).startswith(op.name)


def test_every_sentence_is_reached() -> None:
    """No refusal in kvkeye/ops is dead: each `yield` runs for some bad case, or, if an implementation's, some case."""
    wanted = {}
    for family in FAMILIES:
        module = importlib.import_module(f"kvkeye.ops.{family}")
        for function in vars(module).values():
            if inspect.isgeneratorfunction(function) and function.__module__ == module.__name__:
                lines, start = inspect.getsourcelines(function)
                tree = ast.parse(textwrap.dedent("".join(lines)))
                for node in ast.walk(tree):
                    if isinstance(node, ast.Yield):
                        wanted[(function.__code__.co_filename, start + node.lineno - 1)] = function.__name__
    seen: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        for op in ops.OPS.values():
            for row in bad(op.name, Sample(torch.float32)):
                list(op.requires(*row.args)) if op.requires else None
            for implementation in op.implementations.values():
                if implementation.name != "triton" and implementation.refuses is not None:
                    for case in good(op.name, Sample(torch.float32)):
                        list(implementation.refuses(*case.args))
    finally:
        sys.settrace(None)
    missed = {place: name for place, name in wanted.items() if place not in seen}
    assert not missed, f"no bad case reaches these refusals: {missed}"


@pytest.mark.parametrize(("op", "implementation", "dtype"), list(cells()))
def test_every_cell_has_a_row(op: Op, implementation: str, dtype: str) -> None:
    """A claimed (op, implementation, dtype) accepts at least one case."""
    available(op, implementation)
    if implementation == "triton" and dtype == "bf16" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter rounds bf16 wrongly; these rows run on a GPU")
    cases = good(op.name, Sample(DTYPES[dtype], DEVICES[-1]))
    assert any(accepts(op, implementation, case.args) for case in cases)


@pytest.mark.parametrize("op", ops.OPS.values(), ids=lambda op: op.name)
def test_no_silent_gradient(op: Op) -> None:
    """An op without a gradient raises when one is asked for; PyTorch alone would only warn."""
    if op.backward is not None:
        return
    rows = good(op.name, Sample(torch.float32))
    if not rows:
        source = next((f for f in FORWARD if f.backward is op), None)
        assert source is not None, f"{op.name} has no case and is nobody's backward"
        args: tuple[Any, ...] = gradient_arguments(source, good(source.name, Sample(torch.float32))[0], 0)
    else:
        args = rows[0].args
    given = list(copied(args))
    first = next((i for i, a in enumerate(given) if isinstance(a, Tensor) and a.is_floating_point()), None)
    if first is None:
        assert not any(t.is_floating_point() for t in tensors_of(args)), f"{op.name}: floating tensors in a list"
        return  # integers carry no gradient
    given[first].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        op(*given)
