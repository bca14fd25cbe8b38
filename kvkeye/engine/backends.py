"""Which op implementations an engine runs on: what was asked for, or what keeps an answer's bits its own."""

from __future__ import annotations

import logging

import torch

from kvkeye import ops
from kvkeye.engine.config import EngineConfig
from kvkeye.env import BACKENDS

logger = logging.getLogger("kvkeye.engine")

# Every op of a forward pass, sampling included.
SERVING_OPS = (
    "add_rms_norm",
    "append_kv",
    "copy_blocks",
    "gelu",
    "interpolate_position",
    "layer_norm",
    "merge_patches",
    "packed_linear",
    "paged_attention",
    "qk_norm_mrope_append",
    "rms_norm",
    "rope_2d",
    "sample",
    "silu_mul",
    "token_logprobs",
    "varlen_attention",
    "verify_draft",
)


def serving_backends(config: EngineConfig, device: torch.device) -> str:
    """The order that the runner forces; "" leaves the default order and the environment in charge.

    On a CPU an invariant engine runs on the C++ kernels and nothing else; what is missing is said once, in a warning.
    """
    with ops.use_backends(config.backends):
        pass  # refuses unknown names
    if config.backends or BACKENDS.get() or not config.invariant:
        return config.backends
    if device.type != "cpu":
        logger.warning("invariant=True: on %s the bits of an answer may depend on its batch", device)
        return ""
    missing = {name: ops.OPS[name].implementations["cpp"].absent() for name in SERVING_OPS}
    reasons = {name: reason for name, reason in missing.items() if reason is not None}
    if reasons:
        logger.warning(
            "invariant=True: the bits of an answer may depend on its batch, as %s run without C++ kernels (%s)",
            ", ".join(reasons),
            next(iter(reasons.values())),
        )
        return ""
    return "cpp"
