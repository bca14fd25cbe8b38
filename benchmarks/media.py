"""Clips to packed patches: time beside keye-vl-utils on the same decoded frames, and peak memory by length.

    python benchmarks/media.py --json benchmarks/results/media.jsonl
    python benchmarks/media.py --rows preview_60 1.5_60 --seconds 5

`make peers` installs keye-vl-utils. It returns frames, so that resizing of 1.5's frames, normalisation and cutting into
patches, which the checkpoint's processor does, are added to it as a few torch operations. Decoding is timed apart: the
client's readers hold every frame or need libraries of their own.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import torch
from _client import client_patches, reads
from _keye_vl_utils import is_installed
from _limits import measure_limits
from _measure import Bar, Peer, Row, append, compare, machine, parser, record, show

from kvkeye.media.clip_rules import load_preview_clip, load_slow_fast_clip
from kvkeye.media.decode.pool import MediaDecoder
from kvkeye.media.frame import Frame
from kvkeye.media.job import Job, LoadedMedia, MediaSettings
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.media.patches import patchify
from kvkeye.media.sampling import VideoPolicy

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.samples import clip as sample

SETTINGS = {
    "preview": MediaSettings("preview", 3136, 1_003_520),
    "1.5": MediaSettings("1.5", 3136, 16_056_320, video=VideoPolicy.slow_fast()),
}
CLIENTS = {"preview": "1.0.0", "1.5": "1.5.2"}  # version of keye-vl-utils
ROWS = [f"{version}_{seconds}" for version in SETTINGS for seconds in (60, 600)]
LIMITS = MediaLimits(max_frames=2000, max_decode_seconds=600.0)  # the machine may be busy
OPTIONS = MediaOptions()


def looped(seconds: float) -> bytes:
    """The sample clip (640 x 272, 25 frames per second, 10 s) again and again, its packets copied."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream: Any = None
        for turn in range(round(seconds / 10)):
            with av.open(str(sample("bikes.mp4"))) as source:
                original = source.streams.video[0]
                stream = stream or output.add_stream_from_template(original)
                shift = round(turn * 10 / original.time_base)
                for packet in source.demux(original):
                    if packet.dts is not None:
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + shift, packet.dts + shift
                        output.mux(packet)
    return buffer.getvalue()


class Decoded:
    """A clip whose frames were decoded before; remembers which were asked for."""

    def __init__(self, data: bytes) -> None:
        from kvkeye.media.decode.video import VideoFile

        self.file = VideoFile(io.BytesIO(data), LIMITS, "clip")
        self.num_frames, self.fps = self.file.num_frames, self.file.fps
        self.height, self.width = self.file.height, self.file.width
        self.kept: dict[int, Frame] = {}

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        if not self.kept:
            self.kept = {k: frame.copy() for k, frame in zip(indices, self.file.frames(indices))}
        return (self.kept[k] for k in indices)


def pack(loaded: LoadedMedia) -> torch.Tensor:
    return patchify(loaded.groups, 14, (0.5,) * 3, (0.5,) * 3, loaded.sizes)


def build_row(name: str) -> Row:
    version, seconds = name.split("_")
    clip = Decoded(looped(float(seconds)))
    job = Job(OPTIONS, SETTINGS[version], LIMITS, "clip", lambda tokens: None)
    load = load_preview_clip if version == "preview" else load_slow_fast_clip

    def ours() -> torch.Tensor:
        return pack(load(clip, job))

    ours()  # decodes
    if is_installed(CLIENTS[version]):
        client = reads(CLIENTS[version], clip.kept, clip.num_frames, clip.fps)
        peers = [Peer("keye-vl-utils", "processor as torch operations", lambda: client_patches(client, version))]
    else:
        print(f"keye-vl-utils {CLIENTS[version]} is not installed: run `make peers`; no comparison")
        peers = []

    def verify(outputs: list[torch.Tensor]) -> None:
        levels = 0 if version == "preview" else 1
        for other in outputs[1:]:
            assert outputs[0].shape == other.shape
            assert float((outputs[0] - other).abs().max()) <= levels * 2 / 255 + 1e-6

    return Row(name, peers, [Bar("keye-vl-utils", 2.0)], ours=ours, verify=verify)


def memory_status(name: str, pid: int | str = "self") -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10  # type: ignore[index]


def measure_memory(name: str) -> dict[str, Any]:
    """In a fresh process: seconds and peak memory of reading a clip through worker processes, MiB."""
    version, seconds = name.split("_")
    with MediaDecoder(1) as decoder:

        def load(data: bytes) -> LoadedMedia:
            return load_media("video", data, OPTIONS, SETTINGS[version], LIMITS, "clip", decoder=decoder)

        pack(load(looped(10)))
        data = looped(float(seconds))
        Path("/proc/self/clear_refs").write_text("5")
        before, start = memory_status("VmRSS"), time.perf_counter()
        loaded = load(data)
        spent, peak = time.perf_counter() - start, memory_status("VmHWM") - before
        held = sum(group.nbytes for group in loaded.groups)
        full = 640 * 272 * 3 * sum(len(group) for group in loaded.groups)
        worker = max(memory_status("VmHWM", w.process.pid) for w in decoder._workers)
    mib = {"peak_mib": peak, "resized_frames_mib": held, "sampled_frames_mib": full, "worker_peak_mib": worker}
    return {"row": name, "load_s": spent, "file_mib": len(data) >> 20} | {k: v / 2**20 for k, v in mib.items()}


def measure_row(name: str, given: argparse.Namespace) -> None:
    about, limits = machine(), measure_limits(1 << 26)
    with torch.inference_mode():
        result = compare(build_row(name), given.seconds)
    show(result, limits)
    memory = json.loads(start(given, "--memory", name))
    print("  " + ", ".join(f"{key} {value:.4g}" for key, value in memory.items() if key != "row"))
    append(given.json, about | record(result, limits) | memory)


def start(given: argparse.Namespace, *arguments: str) -> str:
    """The output of a fresh process: versions of the client share a name, and memory is to be clean."""
    json_file = ["--json", str(given.json)] if given.json else []
    common = ["--threads", str(given.threads), "--seconds", str(given.seconds), *json_file]
    command = [sys.executable, __file__, *common, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    options = parser(__doc__, ROWS, seconds=10.0)
    options.add_argument("--memory", help=argparse.SUPPRESS)
    options.add_argument("--alone", help=argparse.SUPPRESS)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory:
        print(json.dumps(measure_memory(given.memory)))
    elif given.alone:
        measure_row(given.alone, given)
    else:
        print(machine())
        for name in given.rows:
            print(start(given, "--alone", name), end="", flush=True)


if __name__ == "__main__":
    main()
