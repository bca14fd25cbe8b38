"""What an engine runs its ops on, by machines that are described, not at hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvkeye import ops
from kvkeye.engine import EngineConfig, SpeculationConfig
from kvkeye.engine.backends import SERVING_OPS, VARIANT, gpu_backends, gpu_choice, is_invariant, serving_backends
from kvkeye.errors import UnsupportedError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def machine(**absent):
    """A machine with every kernel but those of these implementations: name=reason."""
    return lambda implementation: absent.get(implementation.name)


def chosen(dtype=torch.bfloat16, invariant=False, **absent):
    return [gpu_choice(op, dtype, invariant, machine(**absent)) for op in SERVING_OPS if op != "verify_draft"]


@pytest.mark.parametrize("invariant", [False, True])
def test_every_op_runs_on_exactly_one_kernel(invariant, caplog):
    specification = gpu_backends(chosen(invariant=invariant), GPU, invariant)
    with ops.use_backends(specification):
        for op in SERVING_OPS[:-1]:
            names = ops._policy.order(ops.OPS[op].family, op, "cuda").names
            assert len(names) == 1 and names[0] in ("cuda", "triton")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_invariant_engine_takes_no_kernel_whose_bits_depend_on_the_batch():
    free = {choice.op: choice.implementation for choice in chosen()}
    fixed = {choice.op: choice.implementation for choice in chosen(invariant=True)}
    assert {(op, free[op]) for op in free if free[op] != fixed[op]} == set(VARIANT)
    assert fixed["packed_linear"] == "triton"


def test_what_is_missing_is_said_with_the_reason(caplog):
    choices = chosen(cuda="it was not built")
    gpu_backends(choices, GPU, False)
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    left = {choice.op for choice in choices if choice.implementation == "eager"}
    assert {"sample", "copy_blocks", "append_kv"} <= left and "paged_attention" not in left
    assert all(op in record.getMessage() for op in left) and "cuda: it was not built" in record.getMessage()


def test_a_machine_without_any_kernel_runs_the_reference_and_says_so(caplog):
    choices = chosen(cuda="no compiler", triton="not installed")
    assert {choice.implementation for choice in choices} == {"eager"}
    gpu_backends(choices, GPU, True)
    assert "lets an answer's bits depend on its batch" in caplog.text and "triton: not installed" in caplog.text


def test_a_dtype_that_a_kernel_does_not_take_goes_to_the_next():
    found = gpu_choice("paged_attention", torch.float32, False, machine())
    assert (found.implementation, found.passed) == ("triton", ("cuda: does not take float32",))


def test_a_call_that_its_kernel_refuses_is_an_error_and_no_reference():
    with ops.use_backends(gpu_backends(chosen(), GPU, False)), pytest.raises(UnsupportedError, match="order: cuda "):
        ops.append_kv(
            torch.ones(1, 1, 128), torch.ones(1, 1, 128), torch.zeros(1, 1, 32, 128), torch.zeros(1, 1, 32, 128),
            torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip


def test_a_draft_head_on_a_gpu_says_that_it_runs_other_ops_and_that_trees_are_slow(caplog):
    caplog.set_level("INFO", logger="kvkeye.engine")
    head = SpeculationConfig("eagle3", "head")
    serving_backends(EngineConfig("tiny", speculation=head), GPU)
    assert "draft_tree eager" in caplog.text and "tree_width" not in caplog.text
    serving_backends(EngineConfig("tiny", speculation=replace(head, tree_width=2)), GPU)
    assert "tree_width=2" in caplog.text


def test_invariance_is_the_default_where_it_is_free_or_asked_for():
    def config(**values):
        return EngineConfig("tiny", **values)

    assert is_invariant(config(), CPU) and not is_invariant(config(), GPU)
    assert is_invariant(config(speculation=SpeculationConfig()), GPU)
    assert not is_invariant(config(invariant=False), CPU) and is_invariant(config(invariant=True), GPU)
