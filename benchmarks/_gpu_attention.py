"""Attention beside its peers on a GPU. A peer's output is compared before it is timed; one that cannot run says why."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvkeye import ops

Call = Callable[[], Any]
#: Largest difference from a peer, as a share of the largest output: both round weights and outputs to bf16.
TOLERANCE = 2**-6
EAGER_BYTES = 4 << 30  # of scores that the reference may store


@dataclass(frozen=True)
class Shape:
    """Sequences of one call: all tokens packed, or one new token each over a paged cache, of bf16 or of FP8."""

    name: str
    lengths: tuple[int, ...]
    q_heads: int
    kv_heads: int
    dim: int
    causal: bool = False
    paged: bool = False
    fp8: bool = False

    @property
    def op(self) -> str:
        return "paged_attention" if self.paged else "varlen_attention"

    @property
    def flops(self) -> float:
        """Of the two products over pairs that are seen, without padded dimensions."""
        pairs = sum(n if self.paged else n * (n + 1) / 2 if self.causal else n * n for n in self.lengths)
        return 4.0 * pairs * self.q_heads * self.dim

    @property
    def bytes(self) -> float:
        rows = len(self.lengths) if self.paged else sum(self.lengths)
        kept = self.dim + 4 if self.fp8 else 2 * self.dim  # of a key or a value: levels and their scale, or bf16
        return 2.0 * (sum(self.lengths) * self.kv_heads * kept + rows * self.q_heads * 2 * self.dim)


SHAPES = (
    Shape("tower 1 x 4096", (4096,), 16, 16, 72),
    Shape("tower 4 x 1024", (1024,) * 4, 16, 16, 72),
    Shape("prompt 1 x 16384", (16384,), 32, 8, 128, causal=True),
    Shape("decode 1 x 4096", (4096,), 32, 8, 128, paged=True),
    Shape("decode 8 x 32768", (32768,) * 8, 32, 8, 128, paged=True),
    Shape("decode 1 x 4096 fp8", (4096,), 32, 8, 128, paged=True, fp8=True),
    Shape("decode 8 x 32768 fp8", (32768,) * 8, 32, 8, 128, paged=True, fp8=True),
)
TINY = (
    Shape("tower 2 x 40", (40,) * 2, 2, 2, 72),
    Shape("prompt 1 x 70", (70,), 4, 2, 128, causal=True),
    Shape("decode 2 x 96", (96,) * 2, 4, 2, 128, paged=True),
    Shape("decode 2 x 96 fp8", (96,) * 2, 4, 2, 128, paged=True, fp8=True),
)
PAGE = 32


def arguments_of(shape: Shape, device: torch.device) -> tuple[Any, ...]:
    """Those of the op, bf16."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).bfloat16()

    batch, tokens = len(shape.lengths), sum(shape.lengths)
    scale = shape.dim**-0.5
    if not shape.paged:
        bounds = torch.tensor((0, *shape.lengths), device=device).cumsum(0).int()
        q, k, v = (normal(tokens, heads, shape.dim) for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads))
        return q, k, v, bounds, max(shape.lengths), shape.causal, scale
    pages = tokens // PAGE
    cache = (normal(pages, shape.kv_heads, PAGE, shape.dim) for _ in range(2))
    table = torch.randperm(pages, generator=generator, device=device).int().view(batch, -1)
    bounds = torch.arange(batch + 1, device=device).int()
    lengths = torch.tensor(shape.lengths, device=device).int()
    return normal(batch, shape.q_heads, shape.dim), *cache, table, bounds, lengths, None, scale


def in_fp8(arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The call over e4m3 caches, and the same over bf16 caches of what they stand for."""
    q, k, v, *rest = arguments
    scales = [cache.abs().amax(-1).float() / 448 for cache in (k, v)]
    levels = [(cache / scale[..., None]).to(torch.float8_e4m3fn) for cache, scale in zip((k, v), scales)]
    values = [(cache.float() * scale[..., None]).bfloat16() for cache, scale in zip(levels, scales)]
    return (q, *levels, *rest, *scales), (q, *values, *rest)


def dense(shape: Shape, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, H, S, D]; pages are gathered here, before the clock starts."""
    batch = len(shape.lengths)
    q, k, v = arguments[:3]
    if shape.paged:
        table = arguments[3].long()  # [B, M]
        k, v = (cache[table].transpose(2, 3).reshape(-1, shape.kv_heads, shape.dim) for cache in (k, v))
    return tuple(x.view(batch, -1, x.shape[1], x.shape[2]).transpose(1, 2).contiguous() for x in (q, k, v))


def packed(outputs: Tensor) -> Tensor:
    """[B, H, S, D] -> [T, H, D]."""
    return outputs.transpose(1, 2).flatten(0, 1)


def sdpa(backend: SDPBackend) -> Callable[[Shape, tuple[Any, ...]], Call]:
    def make(shape: Shape, arguments: tuple[Any, ...]) -> Call:
        q, k, v = dense(shape, arguments)
        grouped = shape.q_heads != shape.kv_heads

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return packed(
                    F.scaled_dot_product_attention(
                        q, k, v, is_causal=shape.causal, scale=arguments[-1], enable_gqa=grouped
                    )
                )

        return call

    return make


def flex(shape: Shape, arguments: tuple[Any, ...]) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = dense(shape, arguments)
    mask = None
    if shape.causal:
        mask = create_block_mask(
            lambda b, h, row, column: row >= column, None, None, q.shape[2], k.shape[2], device=q.device
        )
    function = torch.compile(flex_attention) if q.is_cuda else flex_attention
    grouped = shape.q_heads != shape.kv_heads
    return lambda: packed(function(q, k, v, block_mask=mask, scale=arguments[-1], enable_gqa=grouped))


def varlen(shape: Shape, arguments: tuple[Any, ...]) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    if shape.paged:
        raise ValueError(f"varlen_attn reads packed keys, not pages of {PAGE} tokens")
    q, k, v, bounds, longest, causal, scale = arguments
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if "window_size" in known else {}
    if "window_size" not in known:
        options["is_causal"] = causal
    if "enable_gqa" in known:
        options["enable_gqa"] = shape.q_heads != shape.kv_heads
    return lambda: varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, **options)


def flashinfer(shape: Shape, arguments: tuple[Any, ...]) -> Call:
    library = importlib.import_module("flashinfer")
    q, k, v = arguments[:3]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
    heads = (shape.q_heads, shape.kv_heads, shape.dim)
    if not shape.paged:
        bounds = arguments[3]
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(bounds, bounds, *heads, causal=shape.causal, sm_scale=arguments[-1], q_data_type=q.dtype)
        return lambda: wrapper.run(q, k, v)
    table = arguments[3]
    bounds = torch.arange(len(shape.lengths) + 1, device=q.device).int() * table.shape[1]
    last = torch.full((len(shape.lengths),), PAGE, dtype=torch.int32, device=q.device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(bounds, table.flatten(), last, *heads, PAGE, q_data_type=q.dtype, sm_scale=arguments[-1])
    return lambda: wrapper.run(q, (k, v))


def eager(shape: Shape, arguments: tuple[Any, ...]) -> Call:
    scores = 4 * shape.q_heads * max(shape.lengths) * (1 if shape.paged else max(shape.lengths))
    if scores > EAGER_BYTES:
        raise ValueError(f"the scores of a sequence take {scores / 2**30:.0f} GiB")
    return own(shape, arguments, "eager")


PEERS: dict[str, Callable[[Shape, tuple[Any, ...]], Call]] = {
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
    "varlen_attn": varlen,
    "FlashInfer": flashinfer,
    "eager": eager,
}


def own(shape: Shape, arguments: tuple[Any, ...], implementation: str) -> Call:
    def call() -> Tensor:
        with ops.use_backends(implementation):
            o: Tensor = ops.OPS[shape.op](*arguments)[0]
        return o

    return call


def usable(
    peers: dict[str, Callable[[Shape, tuple[Any, ...]], Call]], shape: Shape, arguments: tuple[Any, ...], mine: Tensor
) -> tuple[dict[str, Call], dict[str, str]]:
    """Peers that agree, and why the others are left out."""
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, make in peers.items():
        try:
            call = make(shape, arguments)
            other = call()
        except Exception as error:  # another library's refusal is a result of the row
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            continue
        distance = float((mine.float() - other.float()).abs().max() / other.float().abs().max())
        if distance <= TOLERANCE:
            found[name] = call
        else:
            missing[name] = f"differs by {distance:.3f} of the largest output"
    return found, missing


def attention_row(
    shape: Shape,
    implementation: str,
    device: torch.device,
    times: Callable[[list[Call], int], list[float]],
    bandwidth: float | None,
) -> dict[str, Any]:
    """Milliseconds of the kernel and of every peer that agrees with it; AssertionError where none does."""
    plain = mine = arguments_of(shape, device)
    if shape.fp8:
        mine, plain = in_fp8(plain)
    call = own(shape, mine, implementation)
    rehearsed = {"SDPA math": sdpa(SDPBackend.MATH), "FlexAttention": flex, "FlashInfer": flashinfer, "eager": eager}
    known = PEERS if device.type == "cuda" else rehearsed
    if shape.fp8:
        known = known | {"the same kernel over bf16": lambda _, arguments: own(shape, arguments, implementation)}
    peers, missing = usable(known, shape, plain, call())
    assert peers, f"no peer agrees: {missing}"
    milliseconds, *others = times([call, *peers.values()], 20)
    return {
        "ms": milliseconds, "peers_ms": dict(zip(peers, others, strict=True)), "left_out": missing,
        "ratio": min(others) / milliseconds, "tflop_per_s": shape.flops / milliseconds / 1e9,
        "gb_per_s": shape.bytes / milliseconds / 1e6,
        "share_of_copy": shape.bytes / milliseconds * 1e3 / bandwidth if bandwidth else None,
    }  # fmt: skip


def attention_rows(implementations: tuple[str, ...], is_rehearsal: bool) -> Iterator[tuple[str, Shape, str]]:
    """(key, shape, implementation) of every row."""
    for shape in TINY if is_rehearsal else SHAPES:
        known = ops.OPS[shape.op].implementations
        for implementation in implementations:
            if shape.fp8 and is_rehearsal:
                yield f"attention/{shape.name}/eager", shape, "eager"
            elif implementation in known and (not shape.fp8 or torch.float8_e4m3fn in known[implementation].storage):
                yield f"attention/{shape.name}/{implementation}", shape, implementation
