"""Cases of the loss family."""

from __future__ import annotations

from collections.abc import Iterator

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


@cases("token_logprobs")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, vocabulary in ((1, 2), (5, 100), (3, 1031)):
        yield Case(
            f"T{rows}_V{vocabulary}", (sample(rows, vocabulary, scale=4.0), sample.integers(0, vocabulary, rows))
        )
    yield Case("peaked", (sample(4, 64, scale=200.0), sample.integers(0, 64, 4)))
    yield Case("no_rows", (sample(0, 16), sample.integers(0, 16, 0)))
    if sample.big:
        cost = Cost(bytes=64 * 151936 * sample.itemsize)
        args = (sample(64, 151936, scale=4.0), sample.integers(0, 151936, 64))
        yield Case("T64_V151936", args, cost, small=False, bench=True)
    yield Bad("targets", (sample(3, 8), sample.integers(0, 8, 2)), "int64 [T]")
