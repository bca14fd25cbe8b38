"""Which op implementations an engine runs on: what was asked for, or what keeps an answer's bits its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from kvkeye import ops
from kvkeye.engine.config import EngineConfig, SpeculationConfig
from kvkeye.engine.machine import default_dtype
from kvkeye.env import BACKENDS
from kvkeye.errors import ConfigError
from kvkeye.ops import Implementation

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
#: Ops that run their body on a GPU: other ops in a row, each on its kernel, and PyTorch for what lies between.
COMPOSED = {
    "draft_tree": "for a draft head: the ops above in a row, and PyTorch for probabilities and the best of them"
}
#: What reads or writes the keys and values of every token.
FP8_OPS = ("paged_attention", "qk_norm_mrope_append")
#: What takes FP8 caches on a CPU: the reference of these, to try them rather than to serve.
FP8_REFERENCE = ";".join(f"{op}=eager" for op in FP8_OPS) + ";*=cpp"
#: (op, implementation) on a GPU whose bits depend on the number of rows, and why.
VARIANT = {("packed_linear", "cuda"): "cuBLAS chooses its kernel, and with it the order of sums, by the number of rows"}

Absent = Callable[[Implementation], "str | None"]


@dataclass(frozen=True)
class Choice:
    """What an op runs on, and why not on what would come before it."""

    op: str
    implementation: str
    passed: tuple[str, ...] = ()


def gpu_choice(op: str, dtype: torch.dtype, invariant: bool, absent: Absent = Implementation.absent) -> Choice:
    """What `op` runs on in an engine on a GPU: a kernel if there is one, else the reference.

    absent  says why an implementation cannot exist on this machine, or None
    """
    passed: list[str] = []
    for name in ("cuda", "triton"):
        implementation = ops.OPS[op].implementations.get(name)
        if implementation is None:
            reason: str | None = "not written"
        elif invariant and (op, name) in VARIANT:
            reason = VARIANT[op, name]
        elif dtype not in implementation.dtypes:
            reason = f"does not take {str(dtype).removeprefix('torch.')}"
        else:
            reason = absent(implementation)
        if reason is None:
            return Choice(op, name, tuple(passed))
        passed.append(f"{name}: {reason}")
    return Choice(op, "eager", tuple(passed))


def is_invariant(config: EngineConfig, device: torch.device) -> bool:
    """Unless said otherwise: on a CPU, where it costs nothing, and on a GPU for an engine that verifies proposals."""
    if config.invariant is not None:
        return config.invariant
    return device.type == "cpu" or isinstance(config.speculation, SpeculationConfig)


def serving_backends(config: EngineConfig, device: torch.device) -> str:
    """The order that the runner forces; "" leaves the default order and the environment in charge.

    On a CPU an invariant engine runs on the C++ kernels and nothing else. On a GPU every op runs on one kernel, and a
    call that it refuses is an error. What is missing is said once, in a warning.
    """
    with ops.use_backends(config.backends):
        pass  # refuses unknown names
    backends = _backends(config, device)
    if config.kv_cache_dtype == "fp8":
        check_fp8(backends, device)
    return backends


def _backends(config: EngineConfig, device: torch.device) -> str:
    invariant = is_invariant(config, device)
    if config.backends or BACKENDS.get():
        return config.backends
    if device.type != "cpu":
        dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
        names = [op for op in SERVING_OPS if op != "verify_draft" or isinstance(config.speculation, SpeculationConfig)]
        if isinstance(config.speculation, SpeculationConfig) and config.speculation.method == "eagle3":
            _tell_of_head(config.speculation, device)
        return gpu_backends([gpu_choice(op, dtype, invariant) for op in names], device, invariant)
    return _cpu_backends() if invariant else ""


def check_fp8(backends: str, device: torch.device) -> None:
    """ConfigError unless what touches the keys and values of every token takes FP8 caches on these backends."""
    with ops.use_backends(backends) if backends else nullcontext():
        for name in FP8_OPS:
            order = ops.OPS[name].order(device.type)
            known = ops.OPS[name].implementations
            takes = [each for each, found in known.items() if torch.float8_e4m3fn in found.storage]
            if not {*takes, "eager"}.intersection(order):
                raise ConfigError(
                    f"EngineConfig.kv_cache_dtype: got 'fp8', but on {device} {name} runs on {', '.join(order)}; FP8 "
                    f"caches are taken by {', '.join(takes)} in bfloat16, and by eager, the slow reference. Leave "
                    f"kv_cache_dtype at 'auto', or set backends='{FP8_REFERENCE}'."
                )


def gpu_backends(choices: Iterable[Choice], device: torch.device, invariant: bool) -> str:
    """The specification of these choices. What is left to the reference is said in a warning."""
    choices = list(choices)
    left = [choice for choice in choices if choice.implementation == "eager"]
    if left:
        logger.warning(
            "on %s these ops run their eager reference, which is slow%s: %s. `kvkeye doctor` shows every op.",
            device,
            " and lets an answer's bits depend on its batch" if invariant else "",
            "; ".join(f"{choice.op} ({', '.join(choice.passed)})" for choice in left),
        )
    logger.info("ops on %s: %s", device, ", ".join(f"{choice.op} {choice.implementation}" for choice in choices))
    return ";".join(f"{choice.op}={choice.implementation}" for choice in choices)


def _tell_of_head(speculation: SpeculationConfig, device: torch.device) -> None:
    logger.info("ops on %s: draft_tree eager, %s", device, COMPOSED["draft_tree"])
    if speculation.tree_width > 1:
        logger.warning(
            "on %s a draft head makes trees (tree_width=%d) answer by answer and reads from the device at every level, "
            "which is slow; tree_width=1 makes the chains of all answers side by side.",
            device,
            speculation.tree_width,
        )


def _cpu_backends() -> str:
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
