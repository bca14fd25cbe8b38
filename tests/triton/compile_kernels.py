"""Compiles every kernel for a GPU that need not be there; run as a program, prints one JSON line per kernel.

`python -m tests.triton.compile_kernels 90 attention video linear other` compiles for sm_90;
`python -m tests.triton.compile_kernels table` prints the table that stands in triton_kernels/README.md.

The launchers run on meta tensors while the launch itself is replaced by a recorder, so that what is compiled is what
would run: kernel, constants, argument types, alignment, warps and stages. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkeye import triton_kernels as leaves
from kvkeye.triton_kernels import activation, attention, linear, loss, norm, rollout, rope, video_fusion, vision
from kvkeye.triton_kernels.common import launch as launching
from kvkeye.triton_kernels.common import tiles
from tests.native.cuda_resources import TARGETS, Launch, Target, Usage, blocks_per_multiprocessor

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(dim: int, heads: tuple[int, int], causal: bool) -> tuple[Any, ...]:
    q, k, v = (empty(4096, h, dim) for h in (heads[0], heads[1], heads[1]))
    return q, k, v, empty(5, dtype=torch.int32), 1024, causal, dim**-0.5


def attention_calls() -> None:
    for args in (packed(72, (16, 16), False), packed(128, (32, 8), True)):
        attention.varlen_attention(*args)
        q, lse = args[0], empty(4096, args[0].shape[1], dtype=torch.float32)
        attention.varlen_attention_backward(q, lse, *args, q, lse)
    cache, table, ints = empty(512, 8, 32, 128), empty(4, 64, dtype=torch.int32), empty(5, dtype=torch.int32)
    for tokens, tree in ((4, None), (4096, empty(4096, dtype=torch.int64))):  # splits side by side, splits in turn
        q = empty(tokens, 32, 128)
        attention.paged_attention(q, cache, cache, table, ints, ints[:4], tree, 128**-0.5)


def video_calls() -> None:
    """HunyuanVideo at 320 x 512: tiles of 16 frames, 112 frames of 640 tokens, text."""
    q, starts = empty(1, 112 * 640 + 256, 24, 128), empty(25, dtype=torch.int32)
    weights = empty(25, 16, dtype=torch.float32)
    o, lse = video_fusion.tile_attention(q, q, q, starts, weights, 112, 256, 128**-0.5)
    video_fusion.tile_attention_backward(o, lse, q, q, q, starts, weights, 112, 256, 128**-0.5, lse)


def linear_calls() -> None:
    linear.packed_linear(empty(64, 4096), empty(6144, 4096), None)
    linear.packed_linear(empty(64, 588), empty(1152, 588), empty(1152))


def other_calls() -> None:
    x, weight = empty(64, 4096), empty(4096)
    norm.rms_norm(x, weight, 1e-6)
    norm.add_rms_norm(x, x, weight, 1e-6)
    norm.layer_norm(x, weight, weight, 1e-6)
    norm.rms_norm_backward(x, x, weight, 1e-6)
    norm.add_rms_norm_backward(x, x, x, x, weight, 1e-6)
    norm.layer_norm_backward(x, x, weight, weight, 1e-6)
    heads, table = empty(64, 16, 72), empty(64, 36, dtype=torch.float32)
    rope.rope_2d(heads, table, table)
    positions, sections = empty(3, 64, dtype=torch.int64), [16, 24, 24]
    rope.mrope(empty(64, 32, 128), positions, sections, 1e6)
    rest = (empty(64, 48 * 128), empty(128), empty(128), positions, sections, 1e6, 1e-6, 8)
    rope.qk_norm_mrope(*rest)
    rope.qk_norm_mrope_backward(empty(64, 32, 128), empty(64, 8, 128), *rest)
    activation.silu_mul(empty(64, 24576))
    activation.silu_mul_backward(empty(64, 12288), empty(64, 24576))
    for tanh in (True, False):
        activation.gelu(x, tanh)
        activation.gelu_backward(x, x, tanh)
    positions_table = empty(27, 27, 1152)
    vision.interpolate_position(positions_table, [1, 74, 74])
    vision.interpolate_position_backward(empty(5476, 1152), positions_table, [1, 74, 74])
    vision.merge_patches(empty(5476, 1152), [1, 74, 74], 2)
    vision.merge_patches_backward(empty(1369, 4608), [1, 74, 74], 2)
    o, lse = empty(64, 32, 128), empty(64, 32, dtype=torch.float32)
    attention.merge_attention_states(o, lse, o, lse)
    attention.merge_attention_states_backward(o, lse, o, lse, o, lse)
    starts, weights = empty(25, dtype=torch.int32), empty(25, 16, dtype=torch.float32)
    latent = empty(16, 112, 40, 64, dtype=torch.float32)
    for branches, guidance in ((1, 1.0), (2, 5.0)):
        outputs = empty(branches, 25, 16, 16, 40, 64)
        video_fusion.blend_tiles(outputs, starts, weights, 112, guidance)
        video_fusion.fuse_tiles(outputs, starts, weights, latent, guidance, -0.1)
        video_fusion.fuse_tiles_backward(latent, outputs, starts, weights, latent, guidance, -0.1)
    candidates = empty(5, 16, 21, 60, 104)
    rollout.score_candidates(candidates, candidates, 0.5, empty(16, 60, 104, dtype=torch.float32), 8)
    logits, targets = empty(64, 151936), empty(64, dtype=torch.int64)
    loss.token_logprobs(logits, targets)
    loss.token_logprobs_backward(empty(64, dtype=torch.float32), logits, targets)


def source_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The source with the specialisation that Triton would choose for these arguments, and the compiler's options."""
    named = dict(zip((p.name for p in kernel.params), args))
    named |= {p.name: options.pop(p.name) for p in kernel.params if p.name in options}
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = named[param.name]
        if isinstance(value, Tensor):
            signature[param.name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif param.is_constexpr or (value == 1 and type(value) is int and not param.do_not_specialize):
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of local memory (spills, indexed arrays) that the assembler settled on."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "local_bytes": found["STACK"] + found["LOCAL"]}


def target_of(capability: int) -> Target:
    return next(target for target in TARGETS if target.name.rstrip("a") == f"sm_{capability}")


def resident_warps(capability: int, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Warps of such programs that a multiprocessor holds at once."""
    usage, launch = Usage(registers, 0, 0), Launch(32 * num_warps, shared_bytes)
    return num_warps * blocks_per_multiprocessor(target_of(capability), usage, launch)


def shape_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Head size or sums of a matrix kernel, and its tile: "D 72, 128 x 64, 8 warps, 2 stages"."""
    if "num_stages" not in options:
        return ""
    size = "D {D}".format(**options) if "D" in options else "K {K}".format(**options)
    rest = ", ".join(name for name in ("CAUSAL", "HAS_TREE", "IS_PART") if options.get(name))
    tile = "{BLOCK_M} x {BLOCK_N}, {num_warps} warps, {num_stages} stages".format(**options)
    return f"{size}{', ' + rest if rest else ''}: {tile}"


def compiled(capability: int, parts: list[str]) -> Iterator[dict[str, Any]]:
    """One report per kernel and specialisation that the launchers of these parts start on such a GPU."""
    assert leaves.__name__ == "kvkeye.triton_kernels"
    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    launching._start = lambda kernel, grid, args, options: recorded.append((kernel, args, dict(options)))
    tiles.capability_of = lambda device: capability
    for part in parts:
        {"attention": attention_calls, "video": video_calls, "linear": linear_calls, "other": other_calls}[part]()
    done: set[str] = set()
    for kernel, args, options in recorded:
        shape = shape_of(kernel, args, options)
        source, options = source_of(kernel, args, options)
        if source.hash() in done:
            continue
        done.add(source.hash())
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx, taken = built.asm["ptx"], resources(built.asm["cubin"])
        yield {
            "triton": triton.__version__, "kernel": kernel.__name__, "shape": shape,
            "shared_bytes": built.metadata.shared,
            "warps": resident_warps(capability, built.metadata.num_warps, taken["registers"], built.metadata.shared),
            "matrix": sorted({m for m in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if m in ptx}),
            "async_copy_bytes": sorted({int(n, 16) for n in re.findall(r"cp\.async\.c.*?\], (0x[0-9a-f]+)", ptx)}),
            "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
            "narrow_loads": len(re.findall(r"ld\.global[\w.:]*\.[bu](?:8|16)\b", ptx)),
            **taken,
        }  # fmt: skip


def table_row(capability: int, report: dict[str, Any]) -> str:
    """One line of the table in triton_kernels/README.md."""
    name = report["kernel"].strip("_").removesuffix("_kernel")
    sizes = f"{report['registers']} | {report['local_bytes']} | {report['shared_bytes']:,}"
    warps = f"{report['warps']} of {target_of(capability).warps}"
    return f"| `{name}` | sm_{capability} | {report['shape']} | {sizes} | {warps} |"


def table() -> str:
    """Markdown: registers, spilled bytes, shared memory and occupancy of the kernels whose tile depends on the GPU."""
    rows = [
        table_row(capability, report)
        for capability in tiles.known_capabilities()
        for report in compiled(capability, ["attention", "video", "linear"])
        if report["shape"]
    ]
    heading = (
        "kernel",
        "target",
        "call: tile",
        "registers",
        "spilled bytes",
        "shared memory",
        "warps of a multiprocessor",
    )
    return "\n".join([f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *sorted(rows)])


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(f"triton {triton.__version__}\n\n{table()}")
    else:
        for report in compiled(int(sys.argv[1]), sys.argv[2:]):
            print(json.dumps(report), flush=True)
