"""A report of a long clip: strip of frames, curves over time, scores, and which seeds were chosen and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvkeye.video.metrics import MIN_LAG, VideoMetrics, VideoScores

STRIP_FRAMES = 16
THUMBNAIL = 112  # pixels of the longer side


@dataclass
class FrameStrip:
    """Frames at equal distances, kept small: as many as `STRIP_FRAMES`, however long the clip becomes."""

    every: int = 1
    seen: int = 0
    kept: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, frames: Tensor) -> None:
        """Takes [n, 3, H, W] in [0, 1]."""
        for frame in frames:
            if self.seen % self.every == 0:
                self.kept.append((self.seen, _thumbnail(frame)))
            if len(self.kept) > 2 * STRIP_FRAMES:
                self.every *= 2
                self.kept = [(at, picture) for at, picture in self.kept if at % self.every == 0]
            self.seen += 1

    def chosen(self) -> list[tuple[int, Tensor]]:
        """At most `STRIP_FRAMES` of the kept frames, the ends among them."""
        count = min(STRIP_FRAMES, len(self.kept))
        places = torch.linspace(0, len(self.kept) - 1, count).round().long().tolist()
        return [self.kept[i] for i in places]


def _thumbnail(frame: Tensor) -> Tensor:
    height, width = frame.shape[1:]
    scale = THUMBNAIL / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    mode = "nearest" if scale > 1 else "area"
    return F.interpolate(frame[None].float(), size=size, mode=mode)[0]


def write_report(
    folder: Path,
    title: str,
    strip: FrameStrip,
    metrics: VideoMetrics,
    borders: Sequence[int],
    fps: float,
    facts: Mapping[str, Any],
) -> VideoScores:
    """Writes `report.png` and `report.json` into `folder`; returns the scores.

    Args     borders first frames after a seam;  facts what else the JSON file holds: settings, seeds, scores, costs
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scores = metrics.scores(borders)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(
        json.dumps({"title": title, "scores": asdict(scores), "borders": list(borders), **facts}, indent=1) + "\n"
    )
    candidates = facts.get("chunks") or []
    figure = Figure(figsize=(14, 9.2 if candidates else 7.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1.5, 3.6, 1.6] if candidates else [1.5, 3.6]
    rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_strip(rows[0], title, strip, fps)
    _draw_curves(rows[1], metrics, scores, borders, fps)
    if candidates:
        _draw_candidates(rows[2], candidates)
    figure.savefig(folder / "report.png")
    return scores


def _draw_strip(part: Any, title: str, strip: FrameStrip, fps: float) -> None:
    part.suptitle(title, fontsize=11)
    pictures = strip.chosen()
    axes = part.subplots(1, len(pictures), squeeze=False)[0]
    for axis, (at, picture) in zip(axes, pictures):
        axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"{at / fps:.1f} s", fontsize=8)
        axis.set_axis_off()


def _draw_curves(part: Any, metrics: VideoMetrics, scores: VideoScores, borders: Sequence[int], fps: float) -> None:
    seconds = [i / fps for i in range(scores.num_frames)]
    axes = part.subplots(2, 4)
    similarity, loop = metrics.similarity().tolist(), metrics.loop_curve().tolist()
    lags = [(i + MIN_LAG) / fps for i in range(len(loop))]
    for axis, name, at, values in (
        (axes[0, 0], f"frame difference; seam ratio {scores.seam_ratio:.2f}", seconds[1:], metrics.difference),
        (axes[0, 1], f"second difference; jerk {scores.seam_jerk:.2f}", seconds[1:-1], metrics.jerk),
        (axes[0, 2], f"motion: top 5 % of changes; {scores.motion:.3f}", seconds[1:], metrics.motion),
        (axes[0, 3], f"mean luma; flicker {scores.luma_flicker:.4f}", seconds, metrics.luma.tolist()),
        (axes[1, 1], f"similarity to frame 0; subject {scores.subject:.3f}", seconds, similarity),
        (
            axes[1, 2],
            f"loop: similarity at a lag; {scores.loop:.2f}",
            lags,
            loop,
        ),
    ):
        axis.plot(at, values, linewidth=1)
        axis.set_title(name, fontsize=9)
    for channel, color in enumerate(("tab:red", "tab:green", "tab:blue")):
        axes[1, 0].plot(seconds, metrics.channels[:, channel].tolist(), color=color, linewidth=1)
    axes[1, 0].set_title(f"channel means; colour drift {scores.color_drift:.3f}", fontsize=9)
    axes[1, 3].set_axis_off()
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.set_xlabel("seconds", fontsize=7)
    for axis in axes.flat[:6]:
        for border in borders:
            axis.axvline(border / fps, color="0.8", linewidth=0.7, zorder=0)


def _draw_candidates(part: Any, chunks: Sequence[Mapping[str, Any]]) -> None:
    axis = part.subplots()
    for place, chunk in enumerate(chunks):
        for term in chunk["scores"]:
            won = term["seed"] == chunk["chosen"]
            if math.isfinite(term["score"]):
                axis.plot(place, term["score"], "o" if won else "x", color="tab:green" if won else "0.6", markersize=6)
    axis.set_xticks(range(len(chunks)), [f"chunk {c['index']}\nseed {c['chosen']}" for c in chunks], fontsize=7)
    axis.set_title("candidates' scores: the chosen one a disc, those below the motion floor left out", fontsize=9)
    axis.tick_params(labelsize=7)
