"""What benchmarks/gpu.py checks before it times: values, bits that do not depend on the batch, replayed graphs.

A check returns "pass" or "refuse: why" and raises AssertionError with a sentence on what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.engine.graphs import CudaRecorder, Recorder, rerun
from kvkeye.testing.case import Case, Sample, good
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Ops of a decode step that a graph captures.
CAPTURED = (
    "append_kv", "copy_blocks", "paged_attention", "qk_norm_mrope_append", "sample", "verify_draft", "rms_norm",
    "silu_mul",
)  # fmt: skip

Check = Callable[[], str]


def recorder(device: torch.device) -> Recorder:
    return CudaRecorder(device) if device.type == "cuda" else rerun


def outputs_of(op: ops.Op, arguments: tuple[Any, ...], implementation: str) -> tuple[Any, ...]:
    """Results, then the arguments that the call changed."""
    with ops.use_backends(implementation):
        found = op(*arguments)
    changed = changed_arguments(op, arguments).values()
    return (*(as_tuple(found) if found is not None else ()), *changed)


def agrees(op: ops.Op, case: Case, implementation: str) -> str:
    """The row against the reference in float64, and against itself."""
    refusals = list(op.implementations[implementation].reasons(_tensors(case.args), case.args))
    if refusals:
        return f"refuse: {'; '.join(refusals)}"
    truth_arguments = case.args if op.name in ("sample", "verify_draft") else widen(case.args)
    truth = reference_outputs(op, copied(truth_arguments))
    naive = reference_outputs(op, copied(case.args))
    first = outputs_of(op, copied(case.args), implementation)
    again = outputs_of(op, copied(case.args), implementation)
    for out, repeated, yard, exact in zip(first, again, naive, truth, strict=True):
        assert_close(out, yard, exact, f"{op.name} {case.id}")
        assert _same(out, repeated), f"{op.name} {case.id}: a second run gave other bits"
    return "pass"


def gradients_agree(op: ops.Op, case: Case, implementation: str) -> str:
    """The backward op of `op` against the gradient of its body in float64, and against itself."""
    backward = op.backward
    assert backward is not None
    arguments = gradient_arguments(op, case, seed=1)
    if refusals := list(backward.implementations[implementation].reasons(_tensors(arguments), arguments)):
        return f"refuse: {'; '.join(refusals)}"
    truth = autograd_truth(op, case, arguments)
    naive = as_tuple(backward.reference(*copied(arguments)))
    first = outputs_of(backward, copied(arguments), implementation)
    again = outputs_of(backward, copied(arguments), implementation)
    for name, out, repeated, yard, exact in zip(op.gradients, first, again, naive, truth, strict=True):
        if exact is not None:
            assert_close(out, yard, exact, f"{op.name} {case.id}, gradient of {name}")
            assert _same(out, repeated), f"{op.name} {case.id}, gradient of {name}: a second run gave other bits"
    return "pass"


def replays(op: ops.Op, case: Case, implementation: str, device: torch.device) -> str:
    """A recorded call gives the bits of the plain one, each of three times, on changed inputs too."""
    if (found := agrees(op, case, implementation)) != "pass":
        return found
    arguments = copied(case.args)
    recorded: list[tuple[Any, ...]] = []
    replay = recorder(device)(lambda: recorded.append(outputs_of(op, arguments, implementation)))
    for factor in (1.0, 0.5, 1.0):
        inputs = mapped(lambda t, f=factor: (t.float() * f).to(t.dtype) if is_scaled(t) else t.clone(), case.args)
        for target, source in zip(_tensors(arguments), _tensors(inputs), strict=True):
            target.copy_(source)
        replay()
        for out, plain in zip(recorded[-1], outputs_of(op, inputs, implementation), strict=True):
            assert _same(out, plain), f"{op.name} {case.id}: the replay gave other bits than the plain call"
    return "pass"


def rows_keep_their_bits(implementation: str, device: str, fp8: bool = False) -> str:
    """A decoded row, a chain of 8 and a chunk of 64 rows of one sequence: one row's bits, torch.equal."""
    sample = Sample(torch.bfloat16, device)
    length, fresh, block = 4000, 64, 32
    blocks = -(-length // block)
    shape, scales = (blocks, 8, block, 128), ()
    if fp8:
        (k, k_scales), (v, v_scales) = sample.fp8(*shape), sample.fp8(*shape)
        scales = k_scales, v_scales
    else:
        k, v = sample(*shape), sample(*shape)
    table = sample.permutation(blocks).int()[None].contiguous()
    q = sample(fresh, 32, 128)

    def last(rows: int, drop: int) -> tuple[Any, ...]:
        stop = fresh - drop
        bounds = sample.tensor([0, rows], torch.int32)
        context = sample.tensor([length - drop], torch.int32)
        return outputs_of(
            ops.OPS["paged_attention"],
            (q[stop - rows : stop], k, v, table, bounds, context, None, 128**-0.5, *scales),
            implementation,
        )

    whole = last(fresh, 0)
    for rows, drop in ((1, 0), (1, 63), (8, 0), (8, 20), (20, 3)):
        for out, full in zip(last(rows, drop), whole, strict=True):
            assert _same(out, full[fresh - drop - rows : fresh - drop]), (
                f"{rows} rows, {drop} before the last: other bits"
            )
    return "pass"


def conformance(implementations: tuple[str, ...], device: str) -> Iterator[tuple[str, Check]]:
    """(key, check) of every row of the case table, those of backward ops by the cases of their forward."""
    forward_of = {op.backward.name: op for op in ops.OPS.values() if op.backward is not None}
    for op in ops.OPS.values():
        source, check = (forward_of[op.name], gradients_agree) if op.name in forward_of else (op, agrees)
        for implementation in (name for name in implementations if name in op.implementations):
            for name, dtype in DTYPES.items():
                if dtype in op.implementations[implementation].dtypes:
                    for case in good(source.name, Sample(dtype, device)):
                        key = f"conformance/{op.name}/{implementation}/{name}/{case.id}"
                        yield key, partial(check, source, case, implementation)


def graphs(implementations: tuple[str, ...], device: torch.device) -> Iterator[tuple[str, Check]]:
    for name in CAPTURED:
        op = ops.OPS[name]
        for implementation in (known for known in implementations if known in op.implementations):
            cases = good(name, Sample(torch.bfloat16, device.type))
            for case in [*cases[:6], *(case for case in cases[6:] if case.id.startswith("fp8"))]:
                yield f"graphs/{name}/{implementation}/{case.id}", partial(replays, op, case, implementation, device)


def bits(implementations: tuple[str, ...], device: str) -> Iterator[tuple[str, Check]]:
    known = ops.OPS["paged_attention"].implementations
    for name in (name for name in implementations if name in known):
        yield f"bits/paged_attention/{name}", partial(rows_keep_their_bits, name, device)
        if torch.float8_e4m3fn in known[name].storage:
            yield f"bits/paged_attention/{name}/fp8", partial(rows_keep_their_bits, name, device, fp8=True)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    flat = [item for a in arguments for item in (a if isinstance(a, list) else (a,))]
    return [item for item in flat if isinstance(item, Tensor)]


def is_scaled(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() > 1


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype.itemsize == 1:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
