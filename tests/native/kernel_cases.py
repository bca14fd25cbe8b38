"""Runs every C++ kernel of one instruction set against the reference in float64. A script: one process, one choice.

    KVKEYE_CPU_ISA=avx2 python -m tests.native.kernel_cases

A kernel passes where its error against the float64 truth is at most twice that of the eager reference in the working
dtype, or at most 4 eps of the largest true value. Sizes cross the vector widths of all instruction sets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.ops import _library
from kvkeye.testing.compare import changed_arguments

DTYPES = (torch.float32, torch.bfloat16)
GRIDS = [1, 4, 6, 2, 2, 10, 1, 8, 2]  # three pictures, one of two frames
PATCHES = 24 + 40 + 16


@dataclass
class Random:
    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def fp32(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def positions(self, tokens: int) -> Tensor:
        return torch.randint(0, 3000, (3, tokens), generator=self.generator)


def norm(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dim in (1, 3, 72, 128, 1025):
        x, residual, weight, bias, grad, other = r(6, dim), r(6, dim), r(dim), r(dim), r(6, dim), r(6, dim)
        yield "rms_norm", (x, weight, 1e-6)
        yield "rms_norm", (r(dim, 6).t(), weight, 1e-6)
        yield "rms_norm", (r(2, 3, 2 * dim)[..., dim:], weight, 1e-6)
        yield "rms_norm_backward", (grad, x, weight, 1e-6)
        yield "add_rms_norm", (x, residual, weight, 1e-6)
        yield "add_rms_norm_backward", (grad, other, x, residual, weight, 1e-6)
        yield "layer_norm", (x, weight, bias, 1e-6)
        yield "layer_norm_backward", (grad, x, weight, bias, 1e-6)
    x, weight, grad = r(200, 72), r(72), r(200, 72)
    yield "rms_norm_backward", (grad, x, weight, 1e-6)
    yield "layer_norm_backward", (r(72).expand(200, 72), x + 3, weight, weight, 1e-6)


def activation(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for size in (2, 10, 144, 6002):
        gate_up, grad = r(3, size, scale=4.0), r(3, size // 2)
        yield "silu_mul", (gate_up,)
        yield "silu_mul", (r(3, 2 * size, scale=4.0)[:, size:],)
        yield "silu_mul", (r(size, 3).t(),)
        yield "silu_mul_backward", (grad, gate_up)
        for tanh in (True, False):
            yield "gelu", (gate_up, tanh)
            yield "gelu_backward", (r(size, 3).t(), gate_up, tanh)
    edges = torch.tensor([-3e38, -200.0, -88.0, -10.0, -6.0, -1e-30, 0.0, 1e-30, 1.0, 6.0, 90.0, 3e38]).to(r.dtype)
    for tanh in (True, False):
        yield "gelu", (edges[1:-1], tanh)
        yield "gelu_backward", (torch.ones_like(edges[1:-1]), edges[1:-1], tanh)
    yield "silu_mul", (torch.cat((edges, torch.ones_like(edges))),)
    yield "silu_mul_backward", (torch.ones_like(edges), torch.cat((edges, torch.ones_like(edges))))


def rope(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for tokens, heads, dim in ((1, 1, 2), (5, 3, 8), (7, 2, 72), (9, 4, 128)):
        x, cos, sin = r(tokens, heads, dim), r.fp32(tokens, dim // 2), r.fp32(tokens, dim // 2)
        yield "rope_2d", (x, cos, sin)
        yield "rope_2d", (r(tokens, 3 * heads, dim)[:, heads : 2 * heads], cos, sin)
        yield "rope_2d", (r(dim, heads, tokens).permute(2, 1, 0), cos, sin)
        yield "rope_2d_backward", (x, cos, sin)
        sections = [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6]
        yield "mrope", (x, r.positions(tokens), sections, 1e6)
        yield "mrope_backward", (r(heads, tokens, dim).transpose(0, 1), r.positions(tokens), sections, 1e4)
        for q_heads, kv_heads in ((heads, 1), (2 * heads, 2)):
            qkv = r(tokens, 2 * (q_heads + 2 * kv_heads) * dim)[:, : (q_heads + 2 * kv_heads) * dim]
            shared = (qkv, r(dim), r(dim), r.positions(tokens), sections, 1e6, 1e-6, kv_heads)
            yield "qk_norm_mrope", shared
            grads = r(tokens, q_heads, dim), r(tokens, kv_heads, dim)
            yield "qk_norm_mrope_backward", (*grads, *shared)


def kv_cache(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for tokens, kv_heads, dim in ((1, 1, 2), (6, 2, 72), (11, 3, 128)):
        k_cache, v_cache = r(5, kv_heads, 4, dim), r(5, kv_heads, 4, dim)
        slots = torch.randperm(20, generator=r.generator)[:tokens]
        slots[tokens // 2] = -1
        qkv = r(tokens, (4 + 2 * kv_heads) * dim)
        k, v = qkv.view(tokens, -1, dim)[:, 4:].chunk(2, dim=1)
        yield "append_kv", (k, v, k_cache, v_cache, slots)
        yield "append_kv", (r(dim, kv_heads, tokens).permute(2, 1, 0), v, k_cache, v_cache, slots)
        sections = [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6]
        positions = r.positions(tokens)
        yield "qk_norm_mrope_append", (
            qkv, r(dim), r(dim), positions, k_cache, v_cache, slots, sections, 1e6, 1e-6,
        )  # fmt: skip
        yield "copy_blocks", (k_cache, v_cache, torch.tensor([[0, 3], [0, 4], [2, 1]]))
        yield "copy_blocks", (k_cache, v_cache, torch.empty((0, 2), dtype=torch.int64))


def vision(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    images = [torch.randint(0, 256, size, generator=r.generator).to(torch.uint8) for size in ((40, 90, 3), (9, 5, 3))]
    for bilinear in (False, True):
        yield "pack_patches", (images, [28, 70, 42, 14], [0.5] * 3, [0.25] * 3, bilinear, 14, r.dtype)
    for side, dim in ((1, 3), (4, 72), (7, 130)):
        table = r(side, side, dim)
        yield "interpolate_position", (table, GRIDS)
        yield "interpolate_position", (r(dim, side, side).permute(1, 2, 0), [1, 1, 1])
        yield "interpolate_position", (table, [])
        yield "interpolate_position_backward", (r(PATCHES, dim), table, GRIDS)
        x = r(PATCHES, 2 * dim)[:, dim:]
        yield "merge_patches", (x, GRIDS, 2)
        yield "merge_patches", (x, GRIDS, 1)
        yield "merge_patches_backward", (r(PATCHES // 4, 4 * dim), GRIDS, 2)


def frames(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for height, width, patch in ((28, 56, 28), (5, 10, 5), (34, 17, 17), (3, 2, 1)):
        image = torch.randint(0, 256, (height, width, 3), generator=r.generator).to(torch.uint8)
        yield "hsv_patches", (image, patch)
        yield "hsv_patches", (image.transpose(0, 1)[:patch, :patch], patch)
    for size in (1, 63, 40_001):
        a, b = (torch.randint(0, 256, (3, 2 * size), generator=r.generator).to(torch.uint8) for _ in range(2))
        yield "patch_products", (a[:, size:], b[:, size:])


def attention_merge(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for tokens, heads, dim in ((1, 1, 1), (5, 3, 72), (4, 2, 128)):
        lse_a, lse_b = r.fp32(tokens, heads) * 10, r.fp32(tokens, heads) * 10
        lse_a[0, 0] = -torch.inf
        lse_b[-1, -1] = -torch.inf
        o_a, o_b = r(tokens, heads, dim), r(heads, tokens, dim).transpose(0, 1)
        yield "merge_attention_states", (o_a, lse_a, o_b, lse_b)
        grads = r(tokens, heads, dim), r.fp32(tokens, heads)
        yield "merge_attention_states_backward", (*grads, o_a, lse_a, o_b, lse_b)


def loss(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for size in (1, 5, 72, 40001):
        logits = r(4, 2 * size, scale=5.0)[:, size:]
        targets = torch.randint(0, size, (4,), generator=r.generator)
        yield "token_logprobs", (logits, targets)
        yield "token_logprobs", (logits - 1000, targets)
        yield "token_logprobs_backward", (r.fp32(4), logits, targets)


def linear(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    pack, values = ops.pack_weight.reference, ops.values_per_word(r.dtype)
    for rows, inputs, outputs in ((1, 1, 1), (2, 131, 70), (7, 128, 64), (12, 300, 65), (29, 72, 130), (205, 33, 7)):
        x, weight, bias = r(rows, inputs + 3)[:, 1 : inputs + 1], r(outputs, inputs), r(outputs)
        yield "packed_linear", (x, weight, bias)
        yield "packed_linear", (x, r(inputs, outputs).t(), None)
        yield "pack_weight", (weight, 1, values)
        packed, gate_up = pack(weight, 1, values), r(2 * outputs, inputs)
        yield "prepacked_linear", (x, packed, bias, outputs)
        yield "prepacked_linear_add", (x, packed, bias, r(outputs, rows).t())
        for tanh in (True, False):
            yield "prepacked_linear_gelu", (x, packed, bias, outputs, tanh)
        yield "pack_weight", (gate_up, 2, values)
        yield "prepacked_linear_silu_mul", (x, pack(gate_up, 2, values), outputs)
    yield "prepacked_linear", (r(3, 0), pack(r(5, 0), 1, values), r(5), 5)


def int8_linear(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    quantize = ops.quantize_weight.reference
    for rows, inputs, outputs in ((1, 1, 1), (2, 131, 70), (7, 256, 64), (12, 300, 33), (29, 72, 130), (205, 33, 7)):
        x, weight, bias = r(rows, inputs + 3)[:, 1 : inputs + 1], r(outputs, inputs), r(outputs)
        yield "quantize_weight", (r(inputs, outputs).t(), 1)
        yield "int8_linear", (x, *quantize(weight, 1), bias)
        yield "int8_linear_add", (x, *quantize(weight, 1), bias, r(outputs, rows).t())
        gate_up = r(2 * outputs, inputs)
        yield "quantize_weight", (gate_up, 2)
        yield "int8_linear_silu_mul", (x, *quantize(gate_up, 2))


def video_fusion(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for branches, tiles, length, frames, height, width in (
        (1, 3, 4, 9, 3, 5),
        (2, 4, 5, 11, 4, 33),
        (2, 2, 3, 3, 8, 16),
    ):
        starts = torch.randperm(frames, generator=r.generator)[:tiles].int() - 2
        outputs, weights = r(branches, tiles, 2, length, height, width + 1)[..., 1:], r.fp32(tiles, length)
        guidance = 1.0 if branches == 1 else 3.5
        latent, grad = r.fp32(2, frames, height, width), r.fp32(2, frames, height, width)
        yield "blend_tiles", (outputs, starts, weights, frames, guidance)
        yield "blend_tiles_backward", (grad, outputs, starts, weights, frames, guidance)
        yield "fuse_tiles", (outputs, starts, weights, latent, guidance, -0.1)
        yield "fuse_tiles_backward", (grad, outputs, starts, weights, latent, guidance, -0.1)
    for shape, order in (((1, 1, 1, 1), 0), ((2, 5, 7, 9), 4), ((1, 16, 13, 70), 0), ((1, 12, 40, 33), 3)):
        low, high = r(*shape), r(*shape[:-1], shape[-1] + 2)[..., 2:]
        yield "spectral_blend", (low, high, 0.25, 0.4, order)
        yield "spectral_blend_backward", (high, 0.25, 0.4, order)


def rollout(r: Random) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for height, width, grid in ((2, 2, 2), (7, 19, 3), (16, 40, 8)):
        x, v = r(2, 3, 4, height, width + 1)[..., 1:], r(2, 3, 4, height, width)
        yield "score_candidates", (x, v, 0.6, r.fp32(3, height, width), grid)


FAMILIES = (
    norm,
    activation,
    linear,
    int8_linear,
    rope,
    kv_cache,
    vision,
    frames,
    attention_merge,
    loss,
    video_fusion,
    rollout,
)


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def results(name: str, call: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call returns and what it changed."""
    op = ops.OPS[name]
    if op.mutates:
        args = copied(args)
    returned = call(*args)
    found = [] if returned is None else list(returned) if isinstance(returned, tuple) else [returned]
    return [*found, *changed_arguments(op, args).values()]


def error(found: Tensor, truth: Tensor) -> float:
    difference = (found.double() - truth).abs()
    # Where both are the same infinity the difference is NaN; a NaN on one side only must count.
    same = (found.double() == truth) | (found.isnan() & truth.isnan())
    difference = torch.where(same, torch.zeros_like(difference), difference)
    return float("inf") if difference.isnan().any() else float(difference.max()) if difference.numel() else 0.0


def failures(name: str, args: tuple[Any, ...]) -> Iterator[str]:
    reference = ops.OPS[name].reference
    truths = results(name, reference, widened(args))
    eager = results(name, reference, args)
    with ops.use_backends("cpp"):
        found = results(name, ops.OPS[name], args)
    for index, (mine, theirs, truth) in enumerate(zip(found, eager, truths, strict=True)):
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not mine.is_contiguous():
            yield f"{name}[{index}] is {mine.dtype} {tuple(mine.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
            continue
        largest = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
        eps = torch.finfo(mine.dtype).eps if mine.is_floating_point() else 0.0
        allowed = max(2 * error(theirs, truth), 4 * eps * largest)
        if not error(mine, truth) <= allowed:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
            yield f"{name}[{index}] {mine.dtype} {shapes}: error {error(mine, truth):.3g}, allowed {allowed:.3g}"


def main() -> int:
    isa = torch.ops.kvkeye_cpu.cpu_isa() if _library.native("cpp").path else "absent"
    broken: list[str] = []
    count, names = 0, set()
    for dtype in DTYPES:
        random = Random(torch.Generator().manual_seed(0), dtype)
        for family in FAMILIES:
            for name, args in family(random):
                broken += failures(name, args)
                names.add(name)
                count += 1
    print(f"{isa}: {count} calls of {len(names)} ops, {len(broken)} failures")
    print("\n".join(broken))
    return 1 if broken or isa == "absent" else 0


if __name__ == "__main__":
    sys.exit(main())
