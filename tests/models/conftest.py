"""Every model test that takes `backend` runs on the reference ops and on the compiled ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvkeye import ops

_NEEDED = (
    "add_rms_norm", "gelu", "interpolate_position", "layer_norm", "merge_patches", "packed_linear", "paged_attention",
    "qk_norm_mrope", "qk_norm_mrope_append", "rms_norm", "rope_2d", "silu_mul", "varlen_attention",
)  # fmt: skip


def missing_kernels() -> list[str]:
    """Reasons why a whole model cannot run on compiled ops here."""
    reasons = (ops.OPS[name].implementations["cpp"].absent() for name in _NEEDED)
    return [reason for reason in reasons if reason is not None]


@pytest.fixture(params=["eager", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp" and (reasons := missing_kernels()):
        pytest.skip(f"the compiled ops are not complete here: {reasons[0]}")
    # What the model calls is compiled or an error; gradients may have no kernel of their own.
    compiled = ";".join([*(f"{name}=cpp" for name in _NEEDED), "*=cpp,eager"])
    with ops.use_backends("eager" if request.param == "eager" else compiled):
        yield request.param
