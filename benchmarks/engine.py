"""Steps and prompts of the whole engine, beside transformers in the same process and vLLM in its own.

    python benchmarks/engine.py --json benchmarks/results/engine.jsonl
    python benchmarks/engine.py --sides vllm-compiled --rows decode_1
    python benchmarks/engine.py --quantization int8 --sides kvkeye-bf16
    python benchmarks/engine.py --profile

Random bf16 weights of a real geometry, prompts of 512 tokens, greedy, every side the same number of tokens. The sides
take turns of some steps each; medians. The streaming limit is the bytes of weights and KV that a step must read, over
the bandwidth of plain reads, which take turns with the sides: their median. vLLM comes from `make peers`.
"""

# ruff: noqa: E402
from __future__ import annotations

import _isa

_isa.ensure_bf16()

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _engine_checkpoint import GEOMETRIES, Geometry, write_checkpoint
from _engine_profile import print_profile
from _engine_sides import Kvkeye, Prompts, Side, Transformers, Vllm
from _limits import Limits, measure_limits, read_meter
from _measure import Bar, Peer, Result, Row, append, machine, parser, record, show

ROWS = ("decode_1", "decode_8", "prefill")
BATCH = 8  # the largest
TURN = 8  # decode steps before the next side's turn
MAX_TURNS = 8

SIDES: dict[str, Callable[[Path, int], Side]] = {
    "transformers-bf16": lambda folder, length: Transformers(folder, torch.bfloat16, False, length),
    "transformers-bf16-static": lambda folder, length: Transformers(folder, torch.bfloat16, True, length),
    "transformers-fp32": lambda folder, length: Transformers(folder, torch.float32, False, length),
    "kvkeye-bf16": lambda folder, length: Kvkeye(folder.parent / "keye", length, BATCH),
    "vllm-eager": lambda folder, length: Vllm(folder, True, length, BATCH),
    "vllm-compiled": lambda folder, length: Vllm(folder, False, length, BATCH),
}


@contextmanager
def opened(names: list[str], folder: Path, length: int) -> Iterator[list[Side]]:
    """The peers that can be had here; the others are named with the reason."""
    sides: list[Side] = []
    for name in names:
        try:
            sides.append(SIDES[name](folder, length))
        except (FileNotFoundError, RuntimeError) as error:
            print(f"  {name} is left out: {error}")
    try:
        yield sides
    finally:
        for side in sides:
            side.close()
        sides.clear()
        gc.collect()


def random_prompts(geometry: Geometry, batch: int, length: int, seed: int) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    ids: Prompts = torch.randint(0, geometry.text.vocab_size, (batch, length), generator=generator).tolist()
    return ids


def check(sides: list[Side], prompt: list[int]) -> None:
    """Logits after a prompt point the way the peers' do; a wrong engine is not timed."""
    least = 0.99 if sides[0].setting == "bfloat16" else 0.98
    ours = sides[0].last_logits(prompt)
    assert ours is not None
    for side in sides[1:]:
        logits = side.last_logits(prompt)
        if logits is not None:
            similarity = torch.nn.functional.cosine_similarity(ours, logits, dim=0).item()
            print(f"  logits: cosine {similarity:.5f} with {side.group}, {side.setting}")
            if similarity < least:
                raise AssertionError(f"logits differ from {side.group}'s, {side.setting}: cosine {similarity:.4f}")


def decode(
    sides: list[Side], prompts: Prompts, seconds: float, read_rate: Callable[[], float]
) -> tuple[list[list[float]], list[Prompts], float]:
    """Seconds per step and side, the tokens, and the median bandwidth of reads that took turns with the sides.

    Every side makes the same number of steps.
    """
    turns = MAX_TURNS
    for side in sides:
        side.start(prompts, 2 + TURN * (turns + 1))
    warm = sum(side.advance(TURN) for side in sides)
    turns = max(3, min(turns, int(seconds / warm)))
    times: list[list[float]] = [[] for _ in sides]
    rates: list[float] = []
    for _ in range(turns):
        rates.append(read_rate())
        for side, own in zip(sides, times):
            own.append(side.advance(TURN) / TURN)
    return times, [side.finish() for side in sides], statistics.median(rates)


def prefill(sides: list[Side], geometry: Geometry, length: int, seconds: float) -> list[list[float]]:
    """Seconds for one prompt, a new one each time."""
    times: list[list[float]] = [[] for _ in sides]
    spent, turn = 0.0, 0
    while turn < 4 or spent + spent / turn < seconds:
        for side, own in zip(sides, times):
            own.append(side.start(random_prompts(geometry, 1, length, 100 + turn), 1))
            side.finish()
        spent, turn = sum(map(sum, times)), turn + 1
    return [own[1:] for own in times]  # the first turn warms up


def measure(
    name: str, sides: list[Side], geometry: Geometry, given: argparse.Namespace, limits: Limits
) -> tuple[Result, Limits]:
    """The row, and the limits while it was timed."""
    peers = [Peer(side.group, side.setting) for side in sides[1:]]
    length = given.prompt
    if name == "prefill":
        title = f"{given.title}: prompt of {length} tokens"
        row = Row(title, peers, [Bar("transformers", 1.5)], flops=geometry.prompt_flops(length))
        return Result(row, prefill(sides, geometry, length, given.seconds)), limits
    batch = int(name.split("_")[1])
    read_rate = read_meter(1 << 24) if given.quick else read_meter()
    times, tokens, rate = decode(sides, random_prompts(geometry, batch, length, batch), given.seconds, read_rate)
    limits = replace(limits, read=rate)
    counts = {len(answer) for side in tokens for answer in side}
    if len(counts) != 1:
        raise AssertionError(f"{name}: the sides made different numbers of tokens: {counts}")
    for side, answers in zip(sides[1:], tokens[1:]):
        same = sum(a == b for x, y in zip(tokens[0], answers) for a, b in zip(x, y))
        print(f"  {name}: {same} of {batch * counts.copy().pop()} tokens equal those of {side.group}, {side.setting}")
    weights = geometry.weight_bytes() // (2 if given.quantization else 1)
    streamed = weights + geometry.kv_bytes(batch, length + counts.pop() // 2)
    bars = [Bar("vLLM compiled", 1.25 if batch == 1 else 2.0), Bar("kvkeye", 1.7)]
    title = f"{given.title}: one step, {batch} answers after prompts of {length}"
    return Result(Row(title, peers, bars, streamed=float(streamed), least_read=0.7), times), limits


def phases(names: list[str]) -> list[list[str]]:
    """All settings of transformers in one comparison, as its best one counts; each vLLM in one of its own."""
    settings = [name for name in names if name.startswith("transformers")]
    others = [[name] for name in names if name not in settings]
    return [settings, *others] if settings or not others else others


def run(geometry: Geometry, given: argparse.Namespace, limits: Limits, about: dict[str, Any]) -> None:
    folder = given.folder or Path(tempfile.gettempdir()) / f"kvkeye-benchmark-{given.geometry}"
    keye, qwen3 = write_checkpoint(folder, geometry)
    length = given.prompt + 2 + TURN * (MAX_TURNS + 2)
    ours = Kvkeye(keye, length, BATCH, given.quantization)
    if given.profile:
        print_profile(ours, random_prompts(geometry, BATCH, given.prompt, 0), geometry, limits)
        return
    for phase in phases(given.sides):
        with opened(phase, qwen3, length) as peers:
            sides: list[Side] = [ours, *peers]
            check(sides, random_prompts(geometry, 1, given.prompt, 99)[0])
            for name in given.rows:
                result, own = measure(name, sides, geometry, given, limits)
                if given.quick:
                    result.row = replace(result.row, bars=[], least_read=0.0)
                show(result, own)
                append(given.json, about | own.row() | record(result, own))


def main() -> None:
    options = parser(__doc__, ROWS, seconds=20.0)
    options.add_argument("--geometry", choices=list(GEOMETRIES), default="qwen3-0.6b")
    options.add_argument("--quantization", choices=["int8"], help="of our side")
    options.add_argument("--sides", nargs="*", choices=list(SIDES), help="only these peers; without a name, none")
    options.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    options.add_argument("--folder", type=Path, help="where the random checkpoint is kept between runs")
    options.add_argument("--profile", action="store_true", help="where steps of each kind go, by op")
    given = options.parse_args()
    if given.quick:
        given.geometry, given.prompt, given.seconds = "tiny", 32, 0.1
    if given.sides is None:  # in fp32 the larger geometry leaves no memory for a second model
        given.sides = (
            ["transformers-bf16", "vllm-compiled"]
            if given.geometry == "keye-quarter"
            else [name for name in SIDES if not name.startswith("kvkeye")]
        )
    torch.set_num_threads(given.threads)
    geometry = GEOMETRIES[given.geometry]
    given.title = geometry.name + (f", {given.quantization} weights" if given.quantization else "")
    packages = {name: version(name) for name in ("torch", "transformers")}
    about = machine() | {"packages": packages, "quick": given.quick, "geometry": given.geometry}
    limits = measure_limits(max(1 << 24, geometry.weight_bytes()))
    print(f"{about}\n{limits}")
    streamed = geometry.weight_bytes() + geometry.kv_bytes(1, given.prompt)
    print(f"a step of one answer reads {streamed / 1e9:.3f} GB: at least {streamed / limits.read * 1e3:.1f} ms")
    run(geometry, given, limits, about)


if __name__ == "__main__":
    main()
