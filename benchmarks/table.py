"""Markdown tables of the rows that vision.py, engine.py and their like have written.

    python benchmarks/table.py benchmarks/results/vision.jsonl

The last line of each row and set of peers counts; under the table stand machine, versions and limits of those runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHARES = {"copy": "copy", "read": "read", "vector": "vector FLOP/s", "tiles": "tile FLOP/s"}

RATES = {"gflop_per_s": "GFLOP/s", "gb_per_s": "GB/s"}


def latest(files: list[Path]) -> list[dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            key = (row["row"], tuple(row["peers_ms"]), row.get("mkl_enable_instructions", ""))
            found.pop(key, None)  # a newer line also takes the later place
            found[key] = row
    return list(found.values())


def cells(row: dict[str, Any]) -> list[str]:
    own = row["ms"]
    peers = "<br>".join(f"{name}: {number(ms)} ({ms / own:.2f}x)" for name, ms in row["peers_ms"].items())
    bars = "<br>".join(
        f"{'pass' if bar['met'] else '**miss**'}: {bar['ratio']:.2f} of {bar['required']:.2g}, {bar['against']}"
        for bar in row["bars"]
    )
    shares = ", ".join(f"{share:.0%} of {SHARES[name]}" for name, share in row["shares"].items())
    rates = ", ".join(f"{row[name]:.3g} {unit}" for name, unit in RATES.items() if row.get(name))
    return [row["row"], f"{number(own)}{f' ({rates})' if rates else ''}", peers, bars or "none", shares]


def number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def origin(row: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items())
    limits = ", ".join(f"{k.split('_')[1]} {v:g}" for k, v in row.items() if k.startswith("limit_"))
    settings = [
        f"{name.upper()}={row[name]}" for name in ("onednn_max_cpu_isa", "mkl_enable_instructions") if row.get(name)
    ]
    return (
        f"Commit {row['commit']}, {row['cpu']}, {row['threads']} threads, {packages}"
        f"{''.join(', ' + setting for setting in settings)}; limits in GFLOP/s and GB/s: {limits}."
    )


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("files", type=Path, nargs="+")
    rows = latest(options.parse_args().files)
    print("| row | kvkeye ms | peers ms | bars | share of the limit |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(cells(row))} |")
    print()
    for line in dict.fromkeys(map(origin, rows)):
        print(f"- {line}")


if __name__ == "__main__":
    main()
