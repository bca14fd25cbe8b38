"""What only a GPU can show, and why nothing else can."""

from __future__ import annotations

from kvkeye import ops

#: Per step of benchmarks/gpu.py: what stands in for it without a GPU, and what that leaves open.
REASONS = {
    "compile": "the suite compiles every kernel for the targets; their launches on this machine are compiled here",
    "conformance": "the host harness runs cuda rows and the interpreter triton rows; neither is the compiler's code, "
    "the interpreter computes bf16 wrongly, and the order of sums inside a tensor core is not modelled",
    "graphs": "rehearsed by running the call again over the same buffers; only a driver captures and replays",
    "bits": "that a tensor core gives a row the same bits in every place of its tile is an assumption about hardware",
    "engine": "rehearsed on the CPU; waits, pinned copies and graphs of whole steps are the driver's",
    "sanitizer": "compute-sanitizer instruments machine code",
    "decode": "rehearsed on a tiny geometry; its time is the GPU's",
    "prompt": "rehearsed on a tiny geometry; its time is the GPU's",
    "encode": "rehearsed on a tiny tower; its time is the GPU's",
    "attention": "rehearsed on tiny shapes beside SDPA and FlexAttention; flash, cuDNN, varlen_attn and FlashInfer "
    "have no CPU code",
    "video": "rehearsed on tiny shapes; its time is the GPU's",
    "timing": "a time on a CPU says nothing about a GPU",
}


def needs(implementations: tuple[str, ...]) -> str:
    """A line per step, then the cells that only a GPU runs as compiled."""
    lines = [f"{step:<12} {reason}" for step, reason in REASONS.items()]
    for name in implementations:
        cells = [op.name for op in ops.OPS.values() if name in op.implementations]
        lines.append(f"{len(cells)} ops with {name}: {', '.join(sorted(cells))}")
    return "\n".join(lines)
