"""Memory and tokens of a model, from its configuration files alone: nothing is loaded, no GPU is needed.

Sizes are pixels; a clip is SECONDS@FPS:WIDTHxHEIGHT, FPS being the rate at which frames are looked at.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvkeye.cli import exits, options
from kvkeye.cli.bundled import model_files, resolve_model
from kvkeye.cli.terminal import count
from kvkeye.engine.config import DTYPES, KV_CACHE_DTYPES

if TYPE_CHECKING:
    from kvkeye.cli.sums import Estimate

_SIZE = re.compile(r"(\d+)x(\d+)")
_CLIP = re.compile(r"(\d+(?:\.\d+)?)@(\d+(?:\.\d+)?):(\d+)x(\d+)")


def image_size(text: str) -> tuple[int, int]:
    """ "1920x1080" -> (height, width), for argparse."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return int(found[2]), int(found[1])


def clip_size(text: str) -> tuple[float, float, int, int]:
    """ "60@2:1280x720" -> (seconds, fps, height, width), for argparse."""
    found = _CLIP.fullmatch(text)
    if found is None or not float(found[1]) or not float(found[2]):
        raise ValueError(text)
    return float(found[1]), float(found[2]), int(found[4]), int(found[3])


image_size.__name__, clip_size.__name__ = "WIDTHxHEIGHT", "SECONDS@FPS:WIDTHxHEIGHT"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its config.json")
    parser.add_argument("--image", type=image_size, action="append", default=[], metavar="WxH", help="1920x1080")
    parser.add_argument(
        "--video", type=clip_size, action="append", default=[], metavar="S@FPS:WxH", help="60@2:1280x720"
    )
    parser.add_argument(
        "--ctx", type=options.at_least_one, metavar="N", help="tokens of one request (default: as an engine's)"
    )
    parser.add_argument(
        "--seqs", type=options.at_least_one, default=1, metavar="N", help="requests at a time (default: 1)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of keys and values")
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def run(arguments: argparse.Namespace) -> int:
    folder = resolve_model(arguments.model)
    folder = folder.parent if folder.name == "config.json" else folder
    from kvkeye.cli.sums import estimate

    with model_files():
        found = estimate(
            folder, arguments.image, arguments.video, arguments.ctx, arguments.seqs, arguments.dtype,
            arguments.kv_cache_dtype,
        )  # fmt: skip
    if arguments.json:
        print(json.dumps(asdict(found) | {"total_bytes": found.total_bytes}))
    else:
        print("\n".join(_lines(found, folder)))
    return exits.OK


def _lines(found: Estimate, folder: Path) -> list[str]:
    lines = [
        f"{folder.resolve().name}: Keye-VL {found.version}, {found.num_parameters:,} parameters, {found.dtype}",
        "",
    ]
    for media in found.media:
        tokens = f"{media.tokens}" if media.tokens == media.least_tokens else f"{media.least_tokens} to {media.tokens}"
        lines.append(f"  {media.name:<34}{tokens} tokens ({count(media.frames, 'frame')} of {media.size})")
    if found.media:
        lines.append("")
    for name, num_bytes, remark in (
        ("weights", found.weight_bytes, ""),
        ("KV cache", found.kv_bytes, f"{found.kv_bytes_per_token:,} bytes per token, {found.ctx} x {found.seqs}"),
        ("media embeddings", found.embedding_bytes, ""),
        ("encoding step", found.vision_bytes, f"{found.vision_patches} patches, about"),
        ("prefill step", found.step_bytes, f"{found.step_tokens} tokens, about"),
        ("total", found.total_bytes, ""),
        ("free here", found.free_bytes, f"on {found.device}: {'fits' if found.fits else 'does not fit'}"),
    ):
        lines.append(f"  {name:<26}{gib(num_bytes):>12}  {remark}".rstrip())
    if found.media_tokens > found.ctx:
        lines += ["", f"  The pictures and clips take {found.media_tokens} tokens; the context holds {found.ctx}."]
    return lines


def gib(num_bytes: int) -> str:
    """ "16.20 GiB", or MiB below a GiB."""
    if num_bytes < 1 << 30:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / (1 << 30):.2f} GiB"
