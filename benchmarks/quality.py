"""How good long clips are: every method on the tiny video models, against the known motion, with intervals.

    python benchmarks/quality.py --json benchmarks/results/quality.jsonl
    python benchmarks/quality.py --table benchmarks/results/quality.jsonl

Prompts and places are held out from training. Means over prompts and seeds; 95 % intervals by bootstrap, prompts drawn
first, then seeds of each. "against": the mean of paired differences to another arm on the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _measure import append, machine
from _quality_arms import ARMS, Arm, Made

from kvkeye.train.clips.evaluate import held_out, load
from kvkeye.train.clips.measures import measure
from kvkeye.train.clips.models import RATIO
from kvkeye.train.clips.motion import Motion
from kvkeye.video.metrics import VideoMetrics

ASSETS = Path(__file__).resolve().parent.parent / "kvkeye" / "assets"
TIMES = (4, 8)  # the training length
DRAWS = 2000  # of the bootstrap
AGAINST = {False: ("concat", "direct"), True: ("chunks",)}
SHOWN = (
    "seam_ratio", "jump", "identity", "position", "velocity", "color", "drift", "presence", "motion", "loop",
    "color_drift", "luma_flicker", "subject",
)  # fmt: skip
JUDGED = ("seam_ratio", "jump", "identity", "position", "velocity", "color", "drift", "motion")


def one(arm: str, folder: Path, motion: Motion, seed: int, times: Sequence[int]) -> list[dict[str, float]]:
    """Measures of one prompt and seed at each length; a rollout is made once, at the longest."""
    torch.set_num_threads(1)
    pipe, defaults = _pipeline(folder)
    call = {key: value for key, value in defaults.items() if key != "fps"} | {"output_type": "pt"}
    found: list[dict[str, float]] = []
    made: Made | None = None
    for factor in sorted(times, reverse=True):
        num_frames = RATIO * (factor * ((call["num_frames"] - 1) // RATIO + 1) - 1) + 1
        begin = time.monotonic()
        if made is None or not ARMS[arm].guided:
            made = ARMS[arm].make(pipe, call, motion, num_frames, seed)
            latents = factor * ((call["num_frames"] - 1) // RATIO + 1)
            cost = made.denoised / (latents * call["num_inference_steps"])
            seconds = (time.monotonic() - begin) / num_frames
        found.append(measures(made, motion, num_frames, ARMS[arm]) | {"passes": cost, "seconds_per_frame": seconds})
    return found[::-1]


def measures(made: Made, motion: Motion, num_frames: int, arm: Arm) -> dict[str, float]:
    """Every number of a clip's first `num_frames`; jump is the largest frame difference over the median."""
    frames = made.frames[:num_frames].clamp(0, 1)
    metrics = VideoMetrics()
    metrics.add(frames)
    scores = asdict(metrics.scores([border for border in made.borders if border < num_frames]))
    if not made.borders:
        scores["seam_ratio"] = scores["seam_jerk"] = float("nan")
    changes = torch.tensor(metrics.difference)
    scores["jump"] = float(changes.max() / changes.median().clamp_min(1e-8))
    return scores | asdict(measure(frames, motion, placed=arm.guided))


_LOADED: dict[Path, tuple[Any, dict[str, Any]]] = {}  # of a worker process


def _pipeline(folder: Path) -> tuple[Any, dict[str, Any]]:
    if folder not in _LOADED:
        _LOADED[folder] = load(folder)
    return _LOADED[folder]


def interval(values: torch.Tensor) -> list[float]:
    """Mean of [prompts, seeds] and its 95 % interval; NaN where a measure does not apply."""
    if not values.isfinite().any():
        return [float("nan")] * 3
    draws = torch.Generator().manual_seed(0)
    prompts, seeds = values.shape
    rows = torch.randint(prompts, (DRAWS, prompts, 1), generator=draws)
    columns = torch.randint(seeds, (DRAWS, prompts, seeds), generator=draws)
    means = values[rows, columns].nanmean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return [float(values.nanmean()), low, high]


def summary(results: list[list[dict[str, float]]], at: int, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Each measure as [prompts, seeds]."""
    names = results[0][at].keys()
    return {n: torch.tensor([r[at][n] for r in results], dtype=torch.float64).view(shape) for n in names}


def main() -> None:
    given = parse()
    if given.table is not None:
        print(table([json.loads(line) for line in given.table.read_text().splitlines()]))
        return
    motions = held_out(given.prompts, seed=9)
    about = machine() | {"packages": {n: version(n) for n in ("torch", "diffusers")}, "threads": given.processes}
    shape, values = (given.prompts, given.seeds), {}
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        for name in given.arms:
            arm, begin = ARMS[name], time.monotonic()
            folder = given.folder / ("tiny-i2v" if arm.guided else "tiny-t2v")
            jobs = [(motion, 1000 * i + s) for i, motion in enumerate(motions) for s in range(given.seeds)]
            calls = [pool.submit(one, name, folder, motion, seed, given.times) for motion, seed in jobs]
            results = [call.result() for call in calls]
            for at, factor in enumerate(given.times):
                values[name, factor] = own = summary(results, at, shape)
                row = {"arm": name, "times": factor, "clips": len(jobs), "seconds": time.monotonic() - begin}
                row["measures"] = {n: interval(own[n]) for n in own}
                others = [o for o in AGAINST[arm.guided] if o != name and (o, factor) in values]
                row["against"] = {o: {n: interval(own[n] - values[o, factor][n]) for n in JUDGED} for o in others}
                append(given.json, about | row)
                shown = "  ".join(f"{n} {row['measures'][n][0]:.3f}" for n in SHOWN)
                print(f"{name} x{factor} ({row['seconds']:.0f} s): {shown}", flush=True)


def parse() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="only these, in this order")
    found.add_argument("--folder", type=Path, default=ASSETS, help="holds tiny-t2v and tiny-i2v")
    found.add_argument("--times", type=int, nargs="*", default=TIMES, help="lengths, in the training length")
    found.add_argument("--prompts", type=int, default=8)
    found.add_argument("--seeds", type=int, default=4)
    found.add_argument("--processes", type=int, default=2)
    found.add_argument("--json", type=Path, help="append the rows to this file")
    found.add_argument("--table", type=Path, help="print such a file as Markdown instead")
    return found.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table per kind and length, the last row of each arm and length; then the paired differences.

    The file has more measures than the table.
    """
    latest = {(row["arm"], row["times"]): row for row in rows}
    lines: list[str] = []
    for guided in (False, True):
        for factor in sorted({times for _, times in latest}):
            chosen = [latest[name, factor] for name in ARMS if (name, factor) in latest and ARMS[name].guided == guided]
            if not chosen:
                continue
            what = "Image to video" if guided else "Text to video"
            lines += ["", f"{what}, {factor} times the training length, {chosen[0]['clips']} clips each:", ""]
            lines += [f"| arm | passes | {' | '.join(JUDGED)} |", "|---|---|" + "---|" * len(JUDGED)]
            lines += [_line(row) for row in chosen]
            lines += _differences(chosen)
    origin = {
        f"Commit {r['commit']}, {r['cpu']}, {r['threads']} processes, "
        + ", ".join(f"{n} {v}" for n, v in r["packages"].items())
        for r in latest.values()
    }
    return "\n".join([*lines, "", *sorted(origin)]).strip()


def _line(row: dict[str, Any]) -> str:
    found = row["measures"]
    return f"| {row['arm']} | {found['passes'][0]:.1f} | {' | '.join(_cell(found[name]) for name in JUDGED)} |"


def _differences(rows: list[dict[str, Any]]) -> list[str]:
    """Paired differences whose interval excludes 0 are bold."""
    pairs = [(row["arm"], other, found) for row in rows for other, found in row["against"].items()]
    if not pairs:
        return []
    lines = ["", f"| arm less another | {' | '.join(JUDGED)} |", "|---|" + "---|" * len(JUDGED)]
    for name, other, found in pairs:
        cells = (_cell(found[n], bold=found[n][1] > 0 or found[n][2] < 0) for n in JUDGED)
        lines.append(f"| {name} - {other} | {' | '.join(cells)} |")
    return lines


def _cell(found: list[float], bold: bool = False) -> str:
    mean, low, high = found
    if math.isnan(mean):
        return "-"
    text = f"{mean:.3g} ({low:.3g} to {high:.3g})"
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    main()
