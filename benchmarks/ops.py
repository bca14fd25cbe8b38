"""Times the rows of the case table: correctness first, then `cpp` beside a named peer in the same process.

    python benchmarks/ops.py                     every op, fp32 and bf16
    python benchmarks/ops.py --op packed_linear --dtype bf16 --json benchmarks/results/ops.jsonl

The two sides alternate; medians are reported, their ratio, and the share of the copy bandwidth measured in the same
run: rows that fit the caches exceed it. The copy's target is memory in use; so that results lie in such memory too,
malloc is told to keep what is freed. With `--fresh` it is left alone: results of 32 MiB and more are then fresh pages
at every call (`faults`), which the system clears. What is printed is a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _measure import machine, median_times
from _memory import keep_freed_memory, page_faults

from kvkeye import ops
from kvkeye.testing.case import Case, Sample, good
from kvkeye.testing.compare import as_tuple, assert_close, copied, widen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD = [op for op in ops.OPS.values() if good(op.name, Sample(torch.float32))]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any, __: int, causal: bool, scale: float) -> Any:
    """One sequence, heads first, as PyTorch wants it."""
    heads = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale)


def torch_resize(image: torch.Tensor, rows: int, columns: int, bilinear: bool) -> torch.Tensor:
    """uint8 [H, W, 3] to planes [3, rows, columns]."""
    mode = "bilinear" if bilinear else "bicubic"
    return F.interpolate(image.permute(2, 0, 1)[None], size=(rows, columns), mode=mode, antialias=True)[0]


def torch_patches(
    images: list[torch.Tensor], sizes: list[int], mean: Any, std: Any, bilinear: bool, patch: int, dtype: torch.dtype
) -> torch.Tensor:
    """uint8 interpolation, patches, normalisation."""
    packed = []
    for i, image in enumerate(images):
        planes = torch_resize(image, sizes[2 * i], sizes[2 * i + 1], bilinear)
        grid = planes.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).permute(1, 3, 0, 2, 4)
        packed.append(grid.reshape(-1, 3, patch**2).float())
    rows = torch.cat(packed) if len(packed) > 1 else packed[0]
    shift, scale = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    return rows.div_(255).sub_(shift).div_(scale).flatten(1).to(dtype)


#: What PyTorch offers for the same row; ops without an entry are compared with their own eager reference.
PEERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rms_norm": ("torch.rms_norm", lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)),
    "layer_norm": ("torch.layer_norm", lambda x, w, b, eps: F.layer_norm(x, w.shape, w, b, eps)),
    "gelu": ("torch.gelu", lambda x, tanh: F.gelu(x, approximate="tanh" if tanh else "none")),
    "silu_mul": ("torch.silu * up", lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    "packed_linear": ("torch.linear", F.linear),
    "varlen_attention": ("torch SDPA", sdpa),
    "pack_patches": ("torch uint8 interpolate", torch_patches),
    "resize_image": ("torch uint8 interpolate", torch_resize),
    "token_logprobs": ("torch.cross_entropy", lambda x, t: -F.cross_entropy(x.float(), t, reduction="none")),
}


def copy_bandwidths() -> tuple[float, float]:
    """Bytes read and written per second by a copy of 256 MB: to a tensor in use, and to a new one."""
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    over, new = median_times([lambda: target.copy_(source), source.clone], 1.0)
    return 2 * source.nbytes / over, 2 * source.nbytes / new


def verify(op: ops.Op, case: Case) -> None:
    """The correctness row; a wrong kernel is not timed."""
    naive = as_tuple(op.reference(*copied(case.args)))
    truth = as_tuple(op.reference(*widen(case.args))) if op.name != "sample" else naive
    with ops.use_backends("cpp"):
        out = as_tuple(op(*copied(case.args)))
    for o, n, t in zip(out, naive, truth):
        if o is not None:
            assert_close(o, n, t, f"{op.name} {case.id}")


def measure(op: ops.Op, case: Case, dtype: str, seconds: float, bandwidth: float) -> dict[str, Any]:
    verify(op, case)
    name, peer = PEERS.get(op.name, ("eager reference", op.reference))

    def ours() -> Any:
        with ops.use_backends("cpp"):
            return op(*case.args)

    try:
        peer(*case.args)
    except RuntimeError as error:
        name, peer = f"eager reference ({name}: {str(error).splitlines()[0]})", op.reference
    with torch.inference_mode():
        own, other = median_times([ours, lambda: peer(*case.args)], seconds)
    return {
        "op": op.name, "case": case.id, "dtype": dtype, "ms": own * 1e3, "peer": name, "peer_ms": other * 1e3,
        "ratio": other / own, "gb_per_s": case.cost.bytes / own / 1e9, "gflop_per_s": case.cost.flops / own / 1e9,
        "share_of_copy": case.cost.bytes / own / bandwidth, "faults": page_faults(ours),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    flops = f"{row['gflop_per_s']:.0f}" if row["gflop_per_s"] >= 1 else ""
    return (
        f"| `{row['op']}` | {row['case']} | {row['dtype']} | {row['ms']:.3f} | {row['peer']} | {row['peer_ms']:.3f} | "
        f"{row['ratio']:.2f} | {row['gb_per_s']:.1f} | {row['share_of_copy']:.0%} | {flops} | {row['faults']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", nargs="*", help="only these ops")
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row")
    parser.add_argument("--fresh", action="store_true", help="leave malloc alone: large results are fresh memory")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    memory = "kept" if not options.fresh and keep_freed_memory() else "fresh"
    bandwidth, new = copy_bandwidths()
    about = machine() | {"memory": memory, "copy_gb_per_s": bandwidth / 1e9, "new_copy_gb_per_s": new / 1e9}
    print(f"{about}\n")
    print("| op | case | dtype | ms | peer | peer ms | ratio | GB/s | of copy | GFLOP/s | faults |")
    print("|---" * 11 + "|")
    for op in FORWARD:
        if (options.op and op.name not in options.op) or "cpp" not in op.implementations:
            continue
        for dtype in options.dtype:
            for case in (c for c in good(op.name, Sample(DTYPES[dtype], big=True)) if c.bench):
                row = measure(op, case, dtype, options.seconds, bandwidth)
                print(line(row), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    main()
