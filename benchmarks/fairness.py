"""How evenly one answer streams while others send pictures, clips and broken files: gaps between its tokens.

    python benchmarks/fairness.py --json benchmarks/results/fairness.jsonl
    python benchmarks/fairness.py --rows jpeg mp4 --tokens 200

The model has random weights: 8 decoder layers of 512, 6 encoder layers of 288. One text request decodes; beside it,
one after the other as fast as they are answered, requests with media. Gaps are taken where the engine hands tokens out.
A broken file is compared with a sound one of the same number of bytes: its p99 gap may be 1.5 times as long at most.
Runs of the sides of a row take turns; medians of their figures count.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import append, machine, milliseconds, parser
from PIL import Image

from kvkeye import AsyncEngine, EngineConfig, SamplingParams
from kvkeye.engine import Engine
from kvkeye.errors import KvkeyeError, MediaError
from kvkeye.models.keye import KeyeProcessor
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.testing.tiny import tiny_keye_config, write_tiny_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.media import corpus
from tests.samples import clip, photo

BAR = 1.5
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg")
Message = dict[str, Any]


def picture(name: str, size: tuple[int, int] = (1280, 960), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.open(photo(name)).convert("RGB").resize(size).save(buffer, kind, quality=92)
    return buffer.getvalue()


def truncated_jpeg(size: int) -> bytes:
    """The first `size` bytes of a larger picture."""
    return picture("hubble_deep_field.jpg", (4000, 3000))[:size]


def png_bomb(size: int) -> bytes:
    """A header that claims 8000 x 8000 pixels, and rows of zeros that end long before."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(100 << 20), 9)[: size - len(head) - 12]
    data = head + chunk(b"IDAT", rows + bytes(size - len(head) - 12 - len(rows)))
    return data[:size]


def broken_mp4(data: bytes) -> bytes:
    """The clip with its index in place and the last two thirds of its pictures replaced by noise."""
    start = data.index(b"mdat") + 4
    length = struct.unpack(">I", data[start - 8 : start - 4])[0] - 8
    first = start + length // 3
    noise = np.random.default_rng(0).integers(0, 256, start + length - first, np.uint8).tobytes()
    return data[:first] + noise + data[start + length :]


def ask(kind: str, *sources: bytes, **options: Any) -> list[Message]:
    content = [{"type": kind, kind: source, **options} for source in sources]
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


def padded(files: Iterable[tuple[str, bytes, str]], size: int) -> list[bytes]:
    """The files of the hostile corpus, zeros behind them up to `size`: decoders stop before."""
    return [data + bytes(size - len(data)) for _, data, _ in files if len(data) <= size]


def rows() -> dict[str, dict[str, list[list[Message]]]]:
    """Per row the sides: the requests sent beside the text, in turn. Of two, the first is sound, the second broken."""
    small = {"max_pixels": 200_704}  # 256 tokens each
    eight = [picture(PHOTOGRAPHS[i % 5], (1280 - 8 * i, 960)) for i in range(8)]
    jpeg, png = picture("coffee.png"), picture("coffee.png", kind="PNG")
    mp4 = clip("bikes.mp4").read_bytes()
    film = {"fps": 1.0, "max_pixels": 100_352}
    pictures = padded([*corpus.bombs(), *corpus.disguised("image")], len(jpeg))
    clips = padded([*corpus.disguised("video"), *corpus.movies_that_lie()], len(mp4))
    return {
        "alone": {"alone": []},
        "eight": {"8 pictures": [ask("image", *eight, **small)]},
        "jpeg": {
            "sound JPEG": [ask("image", jpeg, **small)],
            "truncated JPEG": [ask("image", truncated_jpeg(len(jpeg)), **small)],
        },
        "png": {"sound PNG": [ask("image", png, **small)], "PNG bomb": [ask("image", png_bomb(len(png)), **small)]},
        "mp4": {"sound MP4": [ask("video", mp4, **film)], "broken MP4": [ask("video", broken_mp4(mp4), **film)]},
        "corpus of pictures": {
            "sound JPEG": [ask("image", jpeg, **small)],
            "hostile pictures": [ask("image", data, **small) for data in pictures],
        },
        "corpus of clips": {
            "sound MP4": [ask("video", mp4, **film)],
            "hostile clips": [ask("video", data, **film) for data in clips],
        },
    }


def geometry() -> KeyeConfig:
    tiny = tiny_keye_config()
    vision = replace(
        tiny.vision, hidden_size=288, intermediate_size=1076, num_hidden_layers=6, num_attention_heads=4, image_size=384
    )
    text = replace(
        tiny.text, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return replace(tiny, vision=vision, text=text)


class Watched:
    """An engine whose steps note when the tokens of the request "text" came."""

    def __init__(self, config: EngineConfig) -> None:
        processor = KeyeProcessor.from_folder(config.model)
        torch.manual_seed(0)
        self.engine = Engine(config, KeyeModel(geometry()).to(torch.bfloat16).eval(), processor)
        self.times: list[float] = []
        step = self.engine.step

        def timed() -> list[Any]:
            outputs = step()
            self.times += [time.perf_counter() for output in outputs if output.request_id == "text"]
            return outputs

        setattr(self.engine, "step", timed)  # noqa: B010

    def gaps(self) -> list[float]:
        found = [after - before for before, after in zip(self.times, self.times[1:])]
        self.times.clear()
        return found


async def beside(served: AsyncEngine, requests: list[list[Message]], tally: dict[str, int]) -> None:
    """Sends the requests in turn, again and again; each answer is waited for."""
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    for messages in itertools.cycle(requests):
        try:
            async for _ in served.generate(messages, sampling):
                pass
            tally["answered"] = tally.get("answered", 0) + 1
        except MediaError:
            tally["refused"] = tally.get("refused", 0) + 1


async def measure(watched: Watched, requests: list[list[Message]], num_tokens: int) -> dict[str, Any]:
    """Gaps of one text answer of `num_tokens` tokens, in seconds."""
    tally: dict[str, int] = {}
    async with AsyncEngine(engine=watched.engine) as served:
        other = asyncio.create_task(beside(served, requests, tally))
        while requests and not tally:  # worker processes start with the first
            if other.done():
                other.result()
            await asyncio.sleep(0.01)
        watched.times.clear()
        tally.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        async for _ in served.generate("Tell me a story.", sampling, request_id="text"):
            pass
        other.cancel()
        with suppress(asyncio.CancelledError, KvkeyeError):
            await other
    gaps = sorted(watched.gaps())
    return {"p50": statistics.median(gaps), "p99": gaps[int(0.99 * len(gaps))], "max": gaps[-1]} | tally


def run_row(watched: Watched, sides: dict[str, list[list[Message]]], rounds: int, num_tokens: int) -> dict[str, Any]:
    """{side: medians over rounds}, the sides taking turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, requests in sides.items():
            found[name].append(asyncio.run(measure(watched, requests, num_tokens)))
    names: Callable[[list[dict[str, Any]]], set[str]] = lambda runs: {key for run in runs for key in run}  # noqa: E731
    return {
        side: {key: statistics.median(run.get(key, 0) for run in runs) for key in sorted(names(runs))}
        for side, runs in found.items()
    }


def show(result: dict[str, Any]) -> float | None:
    """Prints a row; the ratio of the p99 gaps of its two sides."""
    for side, figures in result.items():
        others = ", ".join(f"{figures[key]:g} {key}" for key in ("answered", "refused") if key in figures)
        spans = "  ".join(f"{key} {milliseconds(figures[key]):>8}" for key in ("p50", "p99", "max"))
        print(f"  {side:<16}{spans}   {others}", flush=True)
    if len(result) < 2:
        return None
    sound, broken = (figures["p99"] for figures in result.values())
    print(f"  {'pass' if broken <= BAR * sound else 'MISS'}: p99 {broken / sound:.2f} times; at most {BAR}")
    return float(broken / sound)


def main() -> None:
    table = rows()
    options: argparse.ArgumentParser = parser(__doc__, list(table), seconds=0)
    options.add_argument("--tokens", type=int, default=400, help="length of the text answer")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--patches", type=int, default=1024, help="max_num_encoder_patches")
    options.add_argument("--batched-tokens", type=int, default=256, help="max_num_batched_tokens")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=str(write_tiny_checkpoint(folder)), max_num_encoder_patches=given.patches,
            max_num_batched_tokens=given.batched_tokens, enable_prefix_cache=False, encoder_cache_memory=0,
            speculation=None,
        )  # fmt: skip
        # A thread that ends: its team of OpenMP threads would slow down that of the engine's thread.
        with ThreadPoolExecutor(1) as builder:
            watched = builder.submit(Watched, config).result()
    settings = {"tokens": given.tokens, "patches": given.patches, "batched_tokens": given.batched_tokens}
    about = machine() | {"quick": given.quick} | settings
    print(about)
    try:
        for name in given.rows:
            print(name)
            rounds, tokens = (1, 30) if given.quick else (given.rounds, given.tokens)
            result = run_row(watched, table[name], rounds, tokens)
            append(given.json, about | {"row": name, "sides": result, "ratio": show(result)})
    finally:
        watched.engine.close()


if __name__ == "__main__":
    main()
