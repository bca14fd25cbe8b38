"""Which implementation is tried first: a printed, ordered policy, never a side effect of an import.

Precedence: `use_backends(...)`, then `KVKEYE_BACKENDS`, then the default below. A specification reads
"cpp", "cpp,eager" or "attention=eager;*=cpp,eager", where a key is an op, a family or `*`. A list means the first
that does not refuse; a single name means exactly that one, or an error.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvkeye.env import BACKENDS
from kvkeye.errors import ConfigError

NAMES = ("eager", "cpp", "cuda", "triton")
_DEFAULT = {"cpu": ("cpp", "eager"), "cuda": ("cuda", "triton", "eager")}
_log = logging.getLogger("kvkeye.ops")


@dataclass(frozen=True)
class Order:
    names: tuple[str, ...]
    source: str


#: Kernels by op, for every pair of specifications under which they were chosen.
Choices = dict[tuple[str, str], dict[str, Callable[..., Any]]]
_forced: contextvars.ContextVar[str] = contextvars.ContextVar("kvkeye_backends", default="")
#: The kernels of the block of `settle` that a call stands in.
settled: contextvars.ContextVar[dict[str, Callable[..., Any]] | None] = contextvars.ContextVar(
    "kvkeye_settled", default=None
)


@contextlib.contextmanager
def use_backends(specification: str) -> Iterator[None]:
    """Within the block, ops try these implementations in this order.

    Raises:
        ConfigError: an unknown implementation name.
    """
    parse(specification)
    token, kernels = _forced.set(specification), settled.set(None)
    try:
        yield
    finally:
        settled.reset(kernels)
        _forced.reset(token)


@contextlib.contextmanager
def settle(choices: Choices, specification: str = "") -> Iterator[None]:
    """use_backends for inference loops: within the block a call of an op that has run a `cpp` kernel there before goes
    straight to it, past contract, choice, gradients and tracing.

    All calls of an op must be alike: tensors on the CPU and of dtypes that its kernel takes. `choices` is the caller's,
    empty at first; what was chosen stays in it.

    Raises:
        ConfigError: an unknown implementation name.
    """
    with use_backends(specification) if specification else contextlib.nullcontext():
        token = settled.set(choices.setdefault(specifications(), {}))
        try:
            yield
        finally:
            settled.reset(token)


@functools.lru_cache(maxsize=64)
def parse(specification: str) -> dict[str, tuple[str, ...]]:
    """{"*": order, family or op: order}."""
    table: dict[str, tuple[str, ...]] = {}
    for part in filter(None, (p.strip() for p in specification.split(";"))):
        key, found, value = part.rpartition("=")
        names = tuple(n.strip() for n in value.split(",") if n.strip())
        unknown = [n for n in names if n not in NAMES]
        if unknown or not names:
            raise ConfigError(
                f"backends {specification!r}: {', '.join(unknown) or 'an empty list'} is not an implementation; "
                f"known: {', '.join(NAMES)}. Example: 'attention=eager;*=cpp,eager'."
            )
        table[key.strip() if found else "*"] = names
    return table


@functools.lru_cache(maxsize=4096)
def _lookup(specification: str, family: str, name: str) -> tuple[str, ...] | None:
    table = parse(specification)
    for key in (name, family, "*"):
        if key in table:
            return table[key]
    return None


def specifications() -> tuple[str, str]:
    """Those of `use_backends` and of the environment; empty where nothing is asked for."""
    return _forced.get(), BACKENDS.get()


def order(family: str, name: str, device: str) -> Order:
    """The order in force for one op, and where it comes from."""
    for specification, source in zip(specifications(), ("use_backends", BACKENDS.name)):
        if specification and (names := _lookup(specification, family, name)) is not None:
            return Order(names, source)
    return Order(_DEFAULT.get(device, ("eager",)), "default")


_noted: set[tuple[str, str]] = set()


def note(name: str, implementation: str, tensors: Sequence[Tensor]) -> None:
    """Logs the first time that an op runs an implementation; louder where a GPU call falls to the reference."""
    if (name, implementation) in _noted:
        return
    _noted.add((name, implementation))
    if implementation == "eager" and not _forced.get() and any(t.is_cuda for t in tensors):
        _log.warning("%s runs its eager reference on a GPU; `python -m kvkeye.ops %s` says why", name, name)
    else:
        _log.debug("%s runs %s", name, implementation)
