"""Which implementation is tried first: a printed, ordered policy, never a side effect of an import.

Precedence: `use_backends(...)`, then `KVKEYE_BACKENDS`, then the default below. A specification reads
"cpp", "cpp,eager" or "attention=eager;*=cpp,eager", where a key is an op, a family or `*`. A list means the first
that does not refuse; a single name means exactly that one, or an error.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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


_forced: contextvars.ContextVar[str] = contextvars.ContextVar("kvkeye_backends", default="")


@contextlib.contextmanager
def use_backends(specification: str) -> Iterator[None]:
    """Within the block, ops try these implementations in this order.

    Raises:
        ConfigError: an unknown implementation name.
    """
    parse(specification)
    token = _forced.set(specification)
    try:
        yield
    finally:
        _forced.reset(token)


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
