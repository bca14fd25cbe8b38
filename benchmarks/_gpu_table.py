"""The table of what benchmarks/gpu.py has timed, with goals, met or not, for the card that they were set for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

CARD = "H200"
STEPS = ("decode", "prompt", "encode", "attention", "video", "timing")


@dataclass(frozen=True)
class Goal:
    """`figure` of the row `key` is to be at least, or at most, `bound`, one of which is given."""

    key: str
    figure: str
    least: float | None = None
    most: float | None = None

    def judged(self, row: dict[str, Any]) -> str:
        """ "pass: 4.1 of at most 4.1 ms" in words of the table."""
        value = float(row[self.figure])
        if self.most is not None:
            verdict, bound = value <= self.most, f"at most {self.most:g}"
        else:
            assert self.least is not None
            verdict, bound = value >= self.least, f"at least {self.least:g}"
        return f"{'pass' if verdict else '**miss**'}: {self.figure} {value:.3g}, {bound}"


GOALS = (
    Goal("attention/decode 8 x 32768/cuda", "gb_per_s", least=3900),
    Goal("attention/decode 1 x 4096/cuda", "ms", most=0.009),
    Goal("attention/tower 1 x 4096/triton", "tflop_per_s", least=500),
    Goal("attention/tower 1 x 4096/triton", "ratio", least=1),
    Goal("attention/prompt 1 x 16384/triton", "tflop_per_s", least=600),
    Goal("decode/qwen3-8b/1x4096", "ms", most=4.1),
    Goal("decode/qwen3-8b/1x4096", "invariant_over_free", most=1.1),
    Goal("video/tile_attention/triton", "ratio", least=1),
    Goal("timing/pack_patches/cuda/1365x768", "ms", most=0.150 * 1.365 * 0.768),
    Goal("timing/fuse_tiles/cuda/320p_T112", "share_of_copy", least=0.85),
    Goal("timing/qk_norm_mrope_append/cuda/T4096_32q_8kv", "share_of_copy", least=0.85),
    Goal("timing/rms_norm/triton/4096x4096", "share_of_copy", least=0.85),
    Goal("timing/add_rms_norm/triton/4096x4096", "share_of_copy", least=0.85),
    Goal("timing/silu_mul/triton/4096x6144", "share_of_copy", least=0.85),
)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown: a line per row that was timed, the last of each key and device; under it where they come from."""
    latest = {(row["device"], row["key"]): row for row in rows}
    lines = ["| row | ms | beside | rate | goals |", "|---|---|---|---|---|"]
    origins: dict[str, None] = {}
    for (device, key), row in latest.items():
        if key.partition("/")[0] not in STEPS:
            continue
        origins[
            f"{device}: commit {row['commit'] or 'unknown'}, code {row['code']}, torch {row['torch']}, triton "
            f"{row['triton'] or 'none'}, CUDA {row['cuda'] or 'none'}, driver {row['driver'] or 'none'}."
        ] = None
        lines.append(f"| {' | '.join(cells(device, key, row))} |")
    return "\n".join([*lines, "", *(f"- {origin}" for origin in origins)])


def cells(device: str, key: str, row: dict[str, Any]) -> list[str]:
    if row["status"].startswith("fail"):
        return [key, "-", row["status"].replace("|", "/")[:200], "", ""]
    beside = row["sides_ms"] if "sides_ms" in row else row["peers_ms"]
    peers = [f"{name}: {ms:.4g} ({ms / row['ms']:.2f}x)" for name, ms in beside.items()]
    peers += [f"{name}: left out, {why}".replace("|", "/") for name, why in row.get("left_out", {}).items()]
    rates = [f"{row[name]:.3g} {unit}" for name, unit in RATES.items() if row.get(name)]
    if share := row.get("share_of_copy"):
        rates.append(f"{share:.0%} of copy")
    goals = [goal.judged(row) for goal in GOALS if goal.key == key] if CARD in device else []
    return [key, f"{row['ms']:.4g}", "<br>".join(peers), ", ".join(rates), "<br>".join(goals)]


RATES = {"tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s"}
