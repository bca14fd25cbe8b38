"""The checks of `kvkeye doctor`, each a plain record. A check never raises: what goes wrong is its result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import kvkeye
from kvkeye import env
from kvkeye.cli.bundled import RECIPES, missing
from kvkeye.errors import EnvError, KvkeyeError
from kvkeye.utils.assets import ASSETS

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
MIN_TORCH = (2, 11)
PACKAGES = ("numpy", "safetensors", "tokenizers", "pillow", "av", "jinja2", "blake3")
# Settings of others that change what runs here.
OTHERS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` says what to do where the status is not PASS."""

    name: str
    status: str
    value: str
    advice: str = ""


def all_checks() -> list[Check]:
    """Every check, in the order in which a person reads them."""
    checks = [python(), *packages()]
    groups: list[Callable[[], list[Check]]] = [environment]
    if checks[1].status != FAIL:  # torch
        groups = [processor, libraries, kernels, host, triton, gpus, gpu_ops, fp8_caches, environment]
    for group in groups:
        try:
            checks += group()
        except Exception as error:
            checks.append(Check(group.__name__, FAIL, f"{type(error).__name__}: {error}"))
    return checks + models()


def python() -> Check:
    value = f"kvkeye {kvkeye.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("versions", PASS, value)


def packages() -> list[Check]:
    """torch first, then what the package requires."""
    try:
        import torch
    except ImportError as error:
        return [Check("torch", FAIL, f"cannot be imported: {error}", "pip install 'torch>=2.11'")]
    number = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    status = PASS if number >= MIN_TORCH else FAIL
    advice = "" if status == PASS else "pip install -U 'torch>=2.11'"
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    rest = Check("packages", PASS, ", ".join(found))
    if absent:
        rest = Check("packages", FAIL, f"{', '.join(absent)} not installed", f"pip install {' '.join(absent)}")
    return [Check("torch", status, f"{torch.__version__}, {torch.get_num_threads()} threads", advice), rest]


def processor() -> list[Check]:
    from kvkeye.engine.machine import available_bytes, cpu_flags, default_device, default_dtype

    flags = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"})
    free = available_bytes(default_device()) / (1 << 30)
    dtype = str(default_dtype(default_device())).removeprefix("torch.")
    return [
        Check("CPU", PASS, f"{_cpu_name()}, {os.cpu_count()} cores, {' '.join(flags) or 'no vector extensions known'}"),
        Check("default", PASS, f"{default_device()} in {dtype}, {free:.1f} GiB free"),
    ]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def libraries() -> list[Check]:
    """The two compiled libraries: where they are, or why they are not."""
    import torch

    from kvkeye.ops import _library

    cpp, cuda = _library.native("cpp"), _library.native("cuda")
    advice = "Install a C++ compiler and reinstall kvkeye; until then ops run their eager references on the CPU."
    checks = []
    if cpp.reason is not None:
        checks.append(Check("C++ kernels", WARN, cpp.reason, advice))
    else:
        try:
            isa = _library.native_op("cpp", "cpu_isa")()
            checks.append(Check("C++ kernels", PASS, f"{isa} ({cpp.path})"))
        except RuntimeError as error:
            checks.append(Check("C++ kernels", FAIL, str(error).partition("\n")[0], "Unset KVKEYE_CPU_ISA."))
    if cuda.reason is None:
        checks.append(Check("CUDA kernels", PASS, str(cuda.path)))
    else:
        needed = torch.cuda.is_available()
        advice = "Install a CUDA compiler (nvcc) and reinstall kvkeye." if needed else ""
        checks.append(Check("CUDA kernels", WARN if needed else PASS, f"none: {cuda.reason}", advice))
    return checks


def kernels() -> list[Check]:
    """Runs one op on every implementation that this machine has, against the reference."""
    import torch

    from kvkeye import ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-2, 2, 4 * 128, device=device).view(4, 128)
    weight = torch.linspace(0.5, 1.5, 128, device=device)
    agreed = []
    with ops.use_backends("eager"):
        expected = ops.rms_norm(x, weight, 1e-6)
    for name, implementation in ops.OPS["rms_norm"].implementations.items():
        if any(implementation.reasons([x, weight], (x, weight, 1e-6))):
            continue
        with ops.use_backends(name):
            if not torch.allclose(ops.rms_norm(x, weight, 1e-6), expected, atol=1e-5):
                return [Check("kernels run", FAIL, f"rms_norm of {name} is wrong here", "Rebuild kvkeye.")]
        agreed.append(name)
    return [Check("kernels run", PASS, f"{', '.join(['eager', *agreed])} agree on {device} (all cells: kvkeye ops)")]


def host() -> list[Check]:
    from kvkeye import host as chosen

    status = PASS if chosen.IMPLEMENTATION == "cpp" else WARN
    return [Check("host structures", status, f"{chosen.IMPLEMENTATION}: {chosen.REASON}")]


def triton() -> list[Check]:
    import torch

    from kvkeye.ops import _library

    reason = _library.triton_reason()
    if reason is None:
        return [Check("Triton", PASS, importlib.metadata.version("triton"))]
    needed = torch.cuda.is_available()
    return [
        Check("Triton", WARN if needed else PASS, f"none: {reason}", "pip install 'kvkeye[triton]'" if needed else "")
    ]


def gpus() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", PASS, f"none that torch {torch.__version__} can use")]
    checks = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = (size / (1 << 30) for size in torch.cuda.mem_get_info(index))
        value = f"{found.name}, sm_{found.major}{found.minor}, {free:.1f} of {total:.1f} GiB free"
        checks.append(Check(f"GPU {index}", PASS, f"{value}, CUDA {torch.version.cuda}"))
    return checks


def gpu_ops() -> list[Check]:
    """What each op of a forward pass runs on in an engine on a GPU, and why not on what would come before it.

    Where no GPU is visible, what a machine with one would run: an implementation counts if it is declared.
    """
    import torch

    from kvkeye.engine.backends import COMPOSED, SERVING_OPS, gpu_choice
    from kvkeye.engine.machine import default_dtype
    from kvkeye.ops import Implementation

    seen = torch.cuda.is_available()
    dtype = default_dtype(torch.device("cuda"))
    checks = []
    for op in SERVING_OPS:
        free, fixed = (
            gpu_choice(op, dtype, invariant, Implementation.absent if seen else lambda _: None)
            for invariant in (False, True)
        )
        why = f" ({'; '.join(free.passed)})" if free.passed else ""
        if fixed.implementation != free.implementation:
            why += f"; {fixed.implementation} if invariant ({'; '.join(fixed.passed)})"
        status = WARN if seen and free.implementation == "eager" else PASS
        advice = "The engine runs the slow reference for it: install what is missing." if status == WARN else ""
        would = "" if seen else "would run "
        checks.append(Check(f"GPU {op}", status, would + free.implementation + why, advice))
    would = "" if seen else "would run "
    return checks + [Check(f"GPU {op}", PASS, f"{would}eager ({what})") for op, what in COMPOSED.items()]


def fp8_caches() -> list[Check]:
    """What keys and values in FP8 run on in an engine on a GPU, or why it refuses them."""
    import torch

    from kvkeye import ops
    from kvkeye.engine.backends import FP8_OPS, gpu_choice
    from kvkeye.ops import Implementation

    seen = torch.cuda.is_available()
    runs, refused = [], []
    for op in FP8_OPS:
        choice = gpu_choice(op, torch.bfloat16, False, Implementation.absent if seen else lambda _: None)
        found = ops.OPS[op].implementations.get(choice.implementation)
        if found is None or torch.float8_e4m3fn in found.storage:
            runs.append(f"{op} {choice.implementation}")
        else:
            why = f"{op} runs on {choice.implementation}, which does not take them ({'; '.join(choice.passed)})"
            refused.append(why)
    value = "; ".join(refused) if refused else f"in bfloat16: {', '.join(runs)}"
    return [Check("GPU FP8 caches", PASS, f"{'' if seen else 'would be '}{'refused: ' if refused else ''}{value}")]


def environment() -> list[Check]:
    """Settings in effect; malformed and unknown ones are errors that would otherwise stay unseen."""
    checks = []
    for variable in env.ALL:
        if variable.name in os.environ:
            checks.append(_variable(variable))
    known = {variable.name for variable in env.ALL} | {"KVKEYE_BUILD_NATIVE"}
    for name in sorted(set(os.environ) - known):
        if name.startswith("KVKEYE_"):
            advice = f"Known are {', '.join(sorted(known))}."
            checks.append(Check(name, WARN, "kvkeye has no such variable", advice))
    checks += [Check(name, PASS, os.environ[name]) for name in OTHERS if name in os.environ]
    return checks or [Check("environment", PASS, "no settings")]


def _variable(variable: env.Variable[str]) -> Check:
    try:
        value = variable.get()
        if variable is env.BACKENDS and value:
            from kvkeye.ops import use_backends

            with use_backends(value):
                pass  # raises where the order names something unknown
    except (EnvError, KvkeyeError) as error:
        return Check(variable.name, FAIL, str(error), "Correct it or unset it.")
    return Check(variable.name, PASS, value or "empty: the default")


def models() -> list[Check]:
    """The checkpoints that come with the package, headers checked."""
    checks = []
    for name in RECIPES:
        folder = ASSETS / name
        if not folder.is_dir():
            checks.append(Check("bundled model", WARN, f"{name} is absent", missing(name)))
            continue
        try:
            from kvkeye.models.keye.weights import check_folder

            report = check_folder(folder)
        except (KvkeyeError, ImportError) as error:
            checks.append(Check("bundled model", FAIL, f"{name}: {error}", "Reinstall kvkeye."))
        else:
            checks.append(Check("bundled model", PASS, f"{name}, {report.num_loaded:,} parameters"))
    return checks
