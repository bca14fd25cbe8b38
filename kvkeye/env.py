"""Every environment variable: name, type, default, meaning. A malformed value raises `EnvError`.

Values are read when asked for, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvkeye.errors import EnvError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    name: str
    parse: Callable[[str], T]
    default: T
    meaning: str

    def get(self) -> T:
        text = os.environ.get(self.name)
        if text is None or not text.strip():
            return self.default
        try:
            return self.parse(text.strip())
        except ValueError as error:
            raise EnvError(
                f"{self.name}={text!r}: {error}. Meaning: {self.meaning}. Unset it for the default."
            ) from None


def one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return text

    return parse


def text(value: str) -> str:
    return value


BACKENDS = Variable(
    "KVKEYE_BACKENDS",
    text,
    "",
    "order of op implementations, e.g. 'cpp,eager' or 'attention=eager;*=cpp,eager'",
)
CPU_ISA = Variable(
    "KVKEYE_CPU_ISA",
    one_of("generic", "avx2", "avx512", "amx"),
    "",
    "forces one instruction set of the C++ kernels: generic, avx2, avx512 or amx",
)
LOG = Variable("KVKEYE_LOG", one_of("ops", "info", "debug"), "", "logging level; 'ops' shows the first choice per op")

ALL: tuple[Variable[str], ...] = (BACKENDS, CPU_ISA, LOG)
