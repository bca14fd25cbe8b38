"""One table of cases drives correctness, gradients, the support table and the benchmarks of every op.

A case generator takes a `Sample` and yields `Case`s (calls that must work) and `Bad`s (calls that must raise).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAMILIES = (
    "norm",
    "rope",
    "activation",
    "vision",
    "frames",
    "linear",
    "int8_linear",
    "kv_cache",
    "decoder",
    "attention",
    "sampling",
    "speculative",
    "loss",
    "video_fusion",
    "rollout",
)


@dataclass(frozen=True)
class Cost:
    """What the call must at least move and compute: bytes read and written, floating-point operations."""

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """A call that must work. Rows that are not `small` are left to compiled code; `bench` rows are worth timing."""

    id: str
    args: tuple[Any, ...]
    cost: Cost = Cost()
    small: bool = True
    bench: bool = False
    #: Implementations that may not refuse this call (where they exist at all).
    must_accept: tuple[str, ...] = ("cpp",)


@dataclass(frozen=True)
class Bad:
    """A call that breaks the contract; the error must contain `says`."""

    id: str
    args: tuple[Any, ...]
    says: str


class Sample:
    """Makes the tensors of a case: seeded, in one working dtype, on one device.

    `big` asks for the rows of real size too: those worth timing, which take seconds to make.
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0, big: bool = False) -> None:
        self.dtype, self.device, self.big = dtype, device, big
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in the working dtype."""
        values = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return (values * scale).to(self.dtype).to(self.device)

    def fp32(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values in fp32, whatever the working dtype."""
        return (torch.randn(*shape, generator=self._generator) * scale).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator).to(self.device)

    def fp8(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Normal rows as e4m3 levels [..., D] and their scales [...] in fp32."""
        rows = self.fp32(*shape)
        scales = rows.abs().amax(-1) / 448.0
        return (rows / scales[..., None]).to(torch.float8_e4m3fn), scales

    def tensor(self, values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


Generator = Callable[[Sample], Iterator[Case | Bad]]
_GENERATORS: dict[str, Generator] = {}


def cases(op: str) -> Callable[[Generator], Generator]:
    """Registers the case generator of an op by name."""

    def register(generator: Generator) -> Generator:
        _GENERATORS[op] = generator
        return generator

    return register


def rows(op: str, sample: Sample) -> list[Case | Bad]:
    """All rows of an op; empty for an op without a generator."""
    for family in FAMILIES:
        importlib.import_module(f"kvkeye.testing.cases.{family}")
    generator = _GENERATORS.get(op)
    return list(generator(sample)) if generator else []


def good(op: str, sample: Sample) -> list[Case]:
    return [row for row in rows(op, sample) if isinstance(row, Case)]


def bad(op: str, sample: Sample) -> list[Bad]:
    return [row for row in rows(op, sample) if isinstance(row, Bad)]
