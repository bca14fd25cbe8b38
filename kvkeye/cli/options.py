"""Arguments that several commands share, and their checks. Imports no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvkeye.cli.exits import USAGE, CommandError
from kvkeye.engine.config import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig
from kvkeye.engine.request import SamplingParams

MODES = ("think", "no_think", "auto")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODEL_HELP = "folder of a Keye-VL checkpoint (default: the bundled tiny-keye)"


class AppendMedia(argparse.Action):
    """Collects --image and --video in the order in which they were given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        kind = (option_string or "").lstrip("-")
        namespace.media = [*(namespace.media or ()), (kind, str(values))]


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise ValueError(text)
    return value


def at_least_one(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


positive.__name__, at_least_one.__name__ = "number above 0", "number of at least 1"


def add_media(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("pictures and clips, in this order")
    group.add_argument("--image", action=AppendMedia, dest="media", metavar="FILE", help="a JPEG, PNG or WebP file")
    group.add_argument(
        "--video", action=AppendMedia, dest="media", metavar="FILE", help="a clip, or a folder of its frames"
    )
    group.add_argument("--fps", type=positive, metavar="N", help="frames per second that are looked at")
    return group


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", choices=DTYPES, help="number format (default: what the machine computes fast)")
    group.add_argument("--quantization", choices=QUANTIZATIONS, help="smaller weights for the language model, on a CPU")
    group.add_argument("--device", metavar="NAME", help='"cpu", "cuda", "cuda:1" (default: a GPU if there is one)')
    group.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto",
        help="fp8: keys and values in half the memory, on the CUDA kernels",
    )  # fmt: skip
    group.add_argument(
        "--backends", default="", metavar="ORDER", help="op implementations in order, e.g. cpp,eager (see kvkeye ops)"
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs: operation by operation on a GPU")
    group.add_argument(
        "--draft-head", metavar="NAME", help="the model's draft head: a folder, or tiny-keye-eagle3 for tiny-keye"
    )
    group.add_argument(
        "--max-model-len", type=at_least_one, metavar="N", help="tokens of prompt and answer (default: the model's)"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer (defaults: the checkpoint's own)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--mode", choices=MODES, help="whether to reason first")


def engine_config(arguments: argparse.Namespace, model: Path) -> EngineConfig:
    """One request at a time on this model. Raises ConfigError."""
    return EngineConfig(
        model=str(model),
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=arguments.device,
        kv_cache_dtype=arguments.kv_cache_dtype,
        backends=arguments.backends,
        enforce_eager=arguments.enforce_eager,
        max_model_len=arguments.max_model_len,
        speculation={"method": "eagle3", "model": arguments.draft_head} if arguments.draft_head else "auto",
        max_num_seqs=1,
    )


def sampling(arguments: argparse.Namespace, defaults: SamplingParams | None = None) -> SamplingParams:
    """What was asked for over the checkpoint's values. Raises RequestError."""
    given = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed")}
    return replace(defaults or SamplingParams(), **{name: v for name, v in given.items() if v is not None})


def media_item(kind: str, path: str, fps: float | None = None) -> dict[str, Any]:
    """A content item of a message. A folder given as a clip stands for its pictures in the order of their names.

    Raises CommandError where there is no such file
    """
    file = Path(path).expanduser()
    source: str | list[str] = str(file)
    if kind == "video" and file.is_dir():
        source = sorted(str(frame) for frame in file.iterdir() if frame.suffix.lower() in FRAME_SUFFIXES)
        if not source:
            raise CommandError(f"{kind} {path!r}: no {', '.join(FRAME_SUFFIXES)} files in this folder.", USAGE)
    elif not file.is_file():
        raise CommandError(f"{kind} {path!r}: no such file. Check the path.", USAGE)
    item: dict[str, Any] = {"type": kind, kind: source}
    return item | ({"fps": fps} if kind == "video" and fps is not None else {})
