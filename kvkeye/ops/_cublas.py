"""cuBLAS as an implementation: through torch, which is linked to it and picks its kernels."""

import torch
from torch import Tensor


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See kvkeye.ops.packed_linear. Sums stay in fp32 where cuBLAS splits K, which torch leaves to its own switch."""
    switches = torch.backends.cuda.matmul
    allowed = switches.allow_bf16_reduced_precision_reduction
    if not allowed:
        return torch.nn.functional.linear(x, weight, bias)
    switches.allow_bf16_reduced_precision_reduction = False
    try:
        return torch.nn.functional.linear(x, weight, bias)
    finally:
        switches.allow_bf16_reduced_precision_reduction = allowed
