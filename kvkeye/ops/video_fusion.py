"""Long videos from overlapping tiles in time: fused model outputs, fused attention, mixed spectra."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def tile_frames(starts: Tensor, length: int, num_frames: int) -> Tensor:
    """[J, length] int64: the frames of each tile; behind the last frame comes the first."""
    return (starts.long()[:, None] + torch.arange(length, device=starts.device)) % num_frames


def normalized_tile_weights(windows: Tensor, starts: Tensor, num_frames: int) -> Tensor:
    """Window weights [J, n] divided, frame by frame, by their sum over the tiles: fp64 [J, n].

    Computed once per plan; the ops take the result in fp32.

    Raises:
        ValueError: a covered frame whose weights sum to zero.
    """
    frames = tile_frames(starts, windows.shape[1], num_frames)
    sums = windows.new_zeros(num_frames, dtype=torch.float64)
    sums = sums.index_add(0, frames.flatten(), windows.double().flatten())[frames]
    if not bool((sums > 0).all()):
        frame = int(frames[sums <= 0][0])
        raise ValueError(f"tile weights: those of frame {frame} sum to zero; use a window without zeros at its ends")
    return windows.double() / sums


def _tiles_fit(starts: Tensor, weights: Tensor, tiles: int, length: int, num_frames: int) -> Iterator[str]:
    if starts.dtype != torch.int32 or tuple(starts.shape) != (tiles,):
        yield f"starts is {starts.dtype} {tuple(starts.shape)}; expected int32 [{tiles}]"
    elif starts.device.type == "cpu" and num_frames > 0:  # values of a GPU would have to be waited for
        places = [start % num_frames for start in starts.tolist()]
        if len(set(places)) < len(places):
            yield f"starts are {places} modulo {num_frames} frames; every tile needs a start of its own"
    if weights.dtype not in (torch.float32, torch.float64) or tuple(weights.shape) != (tiles, length):
        yield f"weights is {weights.dtype} {tuple(weights.shape)}; expected fp32 [{tiles}, {length}]"
    if length > num_frames:
        yield f"tiles of {length} frames are longer than the video of {num_frames}"


def _outputs_fit(outputs: Tensor, starts: Tensor, weights: Tensor, num_frames: int, guidance: float) -> Iterator[str]:
    if outputs.dim() != 6 or outputs.shape[0] not in (1, 2):
        yield f"outputs is {tuple(outputs.shape)}; expected [g, J, C, n, h, w] with g = 1 or 2"
        return
    if outputs.shape[0] == 1 and guidance != 1.0:
        yield f"guidance is {guidance} with one branch; pass two branches, or 1.0"
    yield from _tiles_fit(starts, weights, outputs.shape[1], outputs.shape[3], num_frames)


@op(requires=_outputs_fit)
def blend_tiles(outputs: Tensor, starts: Tensor, weights: Tensor, num_frames: int, guidance: float) -> Tensor:
    """The model output of a whole video from those of its overlapping tiles, for any scheduler.

    out[c, f] = sum over tiles k and places i with (starts[k] + i) mod T = f of
                weights[k, i] (u[k, c, i] + guidance (p[k, c, i] - u[k, c, i])),
    where u = outputs[0] (unconditional) and p = outputs[1]; with one branch the bracket is outputs[0][k, c, i].

    Shapes     outputs [g, J, C, n, h, w], g = 1 or 2 branches, J tiles of n frames  starts [J]  weights [J, n]
    Args       outputs floating;  starts int32 frames, modulo num_frames, all different;  weights fp32, normalised
               (`normalized_tile_weights`): they are used as they are;  num_frames T >= n;  guidance 1 with one branch
    Returns    [C, T, h, w] fp32, also for bf16 outputs; 0 in a frame that no tile covers
    Numerics   fp32; the tiles of a frame are added in the order of their starts, so the order in which tiles are
               passed does not change a bit
    Gradient   outputs, weights
    Errors     ValueError on shape, dtype, two equal starts, guidance without a second branch
    Source     Zhang et al. 2025 (VideoMerge), multi-tile latent fusion
    """
    order = torch.argsort(starts % num_frames)
    tiles = wide(outputs[0])
    if outputs.shape[0] == 2:
        tiles = tiles + guidance * (wide(outputs[1]) - tiles)
    weighted = (tiles * wide(weights)[:, None, :, None, None])[order]  # [J, C, n, h, w]
    frames = tile_frames(starts, weights.shape[1], num_frames)[order]
    fused = weighted.new_zeros(outputs.shape[2], num_frames, *outputs.shape[4:])
    for tile, places in zip(weighted, frames):
        fused = fused.index_add(1, places, tile)
    return fused


blend_tiles.fake(
    lambda outputs, starts, weights, num_frames, guidance: wide(weights).new_empty(
        outputs.shape[2], num_frames, *outputs.shape[4:]
    )
)
blend_tiles.implement("cpp")
blend_tiles.implement("cuda")
blend_tiles.implement("triton", "video_fusion:blend_tiles")
blend_tiles_backward = blend_tiles.differentiate("outputs", "weights")
blend_tiles_backward.implement("cpp")
blend_tiles_backward.implement("triton", "video_fusion:blend_tiles_backward")


def _step_fits(
    outputs: Tensor, starts: Tensor, weights: Tensor, latent: Tensor, guidance: float, dsigma: float
) -> Iterator[str]:
    num_frames = latent.shape[1] if latent.dim() == 4 else 0
    expected = (*outputs.shape[2:3], num_frames, *outputs.shape[4:])
    if latent.dtype not in (torch.float32, torch.float64) or tuple(latent.shape) != expected:
        yield f"latent is {latent.dtype} {tuple(latent.shape)}; expected fp32 [C, T, h, w] with the outputs' C, h and w"
    else:
        yield from _outputs_fit(outputs, starts, weights, num_frames, guidance)


@op(requires=_step_fits)
def fuse_tiles(
    outputs: Tensor, starts: Tensor, weights: Tensor, latent: Tensor, guidance: float, dsigma: float
) -> Tensor:
    """One Euler step of flow matching on a whole video, from the model outputs of its overlapping tiles.

    out = latent + dsigma blend_tiles(outputs, starts, weights, T, guidance), in one pass.

    Shapes     outputs [g, J, C, n, h, w], g = 1 or 2 branches  starts [J]  weights [J, n]  latent [C, T, h, w]
    Args       as blend_tiles;  latent fp32;  dsigma = sigma of the next step - sigma of this one
    Returns    [C, T, h, w] fp32; a frame that no tile covers keeps its latent
    Numerics   as blend_tiles; the state stays fp32 whatever the model's dtype
    Gradient   outputs, weights, latent
    Errors     ValueError on shape, dtype, two equal starts, guidance without a second branch
    Source     Zhang et al. 2025 (VideoMerge), multi-tile latent fusion; Euler step: Lipman et al. 2023
    """
    fused = blend_tiles.reference(outputs, starts, weights, latent.shape[1], guidance)
    return wide(latent) + dsigma * fused  # type: ignore[no-any-return]


fuse_tiles.fake(lambda outputs, starts, weights, latent, guidance, dsigma: wide(latent).new_empty(latent.shape))
fuse_tiles.implement("cpp")
fuse_tiles.implement("cuda")
fuse_tiles.implement("triton", "video_fusion:fuse_tiles")
fuse_tiles_backward = fuse_tiles.differentiate("outputs", "weights", "latent")
fuse_tiles_backward.implement("cpp")
fuse_tiles_backward.implement("triton", "video_fusion:fuse_tiles_backward")


def _attention_fits(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int, num_text_tokens: int,
    softmax_scale: float,
) -> Iterator[str]:  # fmt: skip
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        yield f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected three times [B, S, H, D]"
        return
    if q.dtype != k.dtype or k.dtype != v.dtype:
        yield f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; one dtype is required"
    video = q.shape[1] - num_text_tokens
    if num_frames < 1 or num_text_tokens < 0 or video < 0 or video % num_frames:
        yield f"{q.shape[1]} tokens less {num_text_tokens} of text are not {num_frames} frames of equal size"
    if weights.dim() != 2:
        yield f"weights is {tuple(weights.shape)}; expected [J, n]"
    else:
        yield from _tiles_fit(starts, weights, weights.shape[0], weights.shape[1], num_frames)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, L, H, D] -> o [B, S, H, D], lse [B, H, S]."""
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * scale
    lse = scores.logsumexp(-1)
    return torch.einsum("bhsl,blhd->bshd", torch.exp(scores - lse[..., None]), v), lse


@op(requires=_attention_fits)
def tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    weights: Tensor,
    num_frames: int,
    num_text_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention inside overlapping tiles of frames, the tiles' outputs blended per frame.

    A token of frame f = (starts[j] + i) mod T attends, in tile j, to the tokens of the tile's n frames and to all
    text: o = sum over its tiles of weights[j, i] softmax(softmax_scale q.k) v. Text tokens attend to everything.

    Shapes     q, k, v [B, S, H, D], S = T P + X: T frames of P tokens, then X of text  starts [J]  weights [J, n]
    Args       one floating dtype, rows may be strided;  starts int32 frames, modulo T, all different;  weights fp32,
               normalised (`normalized_tile_weights`);  num_frames T >= n;  num_text_tokens X, the last of the
               sequence (all of them real: padding is cut off before);  rotary positions may be those of the whole video
    Returns    o [B, S, H, D] dtype of q, 0 in a frame that no tile covers;  lse [B, H, J n P + X] fp32, natural log of
               the softmax denominators: per tile and token of the tile, then per text token
    Numerics   scores, softmax and sums in fp32
    Gradient   q, k, v, weights (through o and lse)
    Errors     ValueError on shape or dtype disagreement, unequal frames, two equal starts
    Source     Qiu et al. 2023 (FreeNoise), window-based attention fusion, for joint attention over space and time
    """
    queries, keys, values = wide(q), wide(k), wide(v)
    video = q.shape[1] - num_text_tokens
    per_frame = video // num_frames
    places = torch.arange(video, device=q.device).view(num_frames, per_frame)
    text = torch.arange(video, q.shape[1], device=q.device)
    order = torch.argsort(starts % num_frames)
    out, lses = torch.zeros_like(queries), [torch.empty(0)] * len(starts)
    for tile, frames in zip(order.tolist(), tile_frames(starts, weights.shape[1], num_frames)[order]):
        own = places[frames].flatten()
        seen = torch.cat((own, text))
        o, lses[tile] = _attend(queries[:, own], keys[:, seen], values[:, seen], softmax_scale)
        share = weights[tile].to(o.dtype).repeat_interleave(per_frame)[:, None, None]
        out = out.index_add(1, own, share * o)
    o, lse = _attend(queries[:, text], keys, values, softmax_scale)
    return out.index_add(1, text, o).to(q.dtype), torch.cat((*lses, lse), -1)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int, num_text_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tiled = weights.shape[0] * weights.shape[1] * ((q.shape[1] - num_text_tokens) // num_frames)
    return q.new_empty(q.shape), wide(q).new_empty(q.shape[0], q.shape[2], tiled + num_text_tokens)


tile_attention.fake(_attention_fake)
tile_attention.implement("cpp")
tile_attention.implement("triton", "video_fusion:tile_attention")
tile_attention_backward = tile_attention.differentiate("q", "k", "v", "weights", outputs=("out_1",))
tile_attention_backward.implement("cpp")
tile_attention_backward.implement("triton", "video_fusion:tile_attention_backward")


def _filter_fits(sizes: Sequence[int], cutoff_space: float, cutoff_time: float, order: int) -> Iterator[str]:
    if min(sizes) < 1:
        yield f"the sizes in time, height and width are {tuple(sizes)}; all must be at least 1"
    if not (cutoff_space > 0 and cutoff_time > 0):
        yield f"the cut-offs are {cutoff_space} and {cutoff_time}; both are shares of the Nyquist frequency above 0"
    if order < 0:
        yield f"butterworth_order is {order}; expected 0 (Gaussian) or a positive order"


def low_pass(
    sizes: Sequence[int], cutoff_space: float, cutoff_time: float, butterworth_order: int, device: torch.device
) -> Tensor:
    """fp64 [T, h, w // 2 + 1]: the mask of the half spectrum, even in every frequency for even and odd sizes."""
    time, height, width = (2 * torch.fft.fftfreq(size, dtype=torch.float64, device=device) for size in sizes)
    width = width[: sizes[2] // 2 + 1]
    # Squared distance in units of cutoff_space: one cut-off for space, another for time.
    distance = (time / cutoff_time).square()[:, None, None] + (
        height.square()[:, None] + width.square()
    ) / cutoff_space**2
    mask: Tensor = 1 / (1 + distance**butterworth_order) if butterworth_order else torch.exp(-0.5 * distance)
    return mask


def _filtered(x: Tensor, mask: Tensor) -> Tensor:
    """Real x [..., T, h, w] through a mask of its half spectrum."""
    if x.numel() == 0:
        return x
    axes = (-3, -2, -1)
    spectrum = torch.fft.rfftn(x, dim=axes).mul_(mask.to(x.dtype))
    filtered: Tensor = torch.fft.irfftn(spectrum, s=x.shape[-3:], dim=axes)
    return filtered


def _blend_fits(
    low: Tensor, high: Tensor, cutoff_space: float, cutoff_time: float, butterworth_order: int
) -> Iterator[str]:
    if low.dim() < 3 or high.shape != low.shape or high.dtype != low.dtype:
        given = f"low is {low.dtype} {tuple(low.shape)}, high {high.dtype} {tuple(high.shape)}"
        yield f"{given}; expected twice [..., T, h, w]"
    else:
        yield from _filter_fits(low.shape[-3:], cutoff_space, cutoff_time, butterworth_order)


@op(requires=_blend_fits)
def spectral_blend(
    low: Tensor, high: Tensor, cutoff_space: float, cutoff_time: float, butterworth_order: int
) -> Tensor:
    """The low frequencies of one video with the high frequencies of another.

    out = high + L(low - high), which is L(low) + (1 - L)(high) by one filter instead of two. L multiplies the
    spectrum over (T, h, w) by exp(-d / 2), or by 1 / (1 + d^order) for a Butterworth order, where
    d = (f_t / cutoff_time)^2 + (f_h^2 + f_w^2) / cutoff_space^2 and f in [-1, 1) are shares of the Nyquist frequency.

    Shapes     low, high [..., T, h, w], all sizes even or odd
    Args       one floating dtype;  cut-offs positive;  butterworth_order 0 for the Gaussian
    Returns    [..., T, h, w], dtype of low
    Numerics   fp32, one rounding at the end; a real transform pair, each video's own
    Gradient   low, high
    Errors     ValueError on shape or dtype disagreement, cut-offs that are not positive, a negative order
    Source     Lu et al. 2024 (FreeLong), eq. 5; filters: Wu et al. 2024 (FreeInit)
    """
    mask = low_pass(low.shape[-3:], cutoff_space, cutoff_time, butterworth_order, low.device)
    base = wide(high)
    return (base + _filtered(wide(low) - base, mask)).to(low.dtype)


@op
def spectral_blend_backward(
    grad: Tensor, cutoff_space: float, cutoff_time: float, butterworth_order: int
) -> tuple[Tensor, Tensor]:
    """Gradients of spectral_blend with respect to low and high: L(grad) and grad - L(grad); L is symmetric."""
    mask = low_pass(grad.shape[-3:], cutoff_space, cutoff_time, butterworth_order, grad.device)
    low = _filtered(wide(grad), mask)
    return low.to(grad.dtype), (wide(grad) - low).to(grad.dtype)


#: csrc/include/kvkeye/fft.h: the largest factor of a size that the C++ transform takes.
_LARGEST_RADIX = 64


def _large_factor(video: Tensor, *_: Tensor | float) -> Iterator[str]:
    for axis, size in zip(("T", "h", "w"), video.shape[-3:]):
        rest = size
        for radix in range(2, _LARGEST_RADIX + 1):
            while rest > 0 and rest % radix == 0:
                rest //= radix
        if rest > 1:
            yield f"{axis} = {size} has a prime factor above {_LARGEST_RADIX}; the transform takes smaller ones"


spectral_blend.implement("cpp", refuses=_large_factor)
spectral_blend_backward.implement("cpp", refuses=_large_factor)
spectral_blend.differentiate(
    "low", "high", backward=spectral_blend_backward, save=("cutoff_space", "cutoff_time", "butterworth_order")
)


def _refresh_fits(
    x: Tensor, fresh: Tensor, keep: Tensor, gain: Tensor, cutoff_space: float, cutoff_time: float,
    butterworth_order: int,
) -> Iterator[str]:  # fmt: skip
    if x.dim() < 3 or fresh.shape != x.shape or fresh.dtype != x.dtype:
        given = f"x is {x.dtype} {tuple(x.shape)}, fresh {fresh.dtype} {tuple(fresh.shape)}"
        yield f"{given}; expected twice [..., T, h, w]"
        return
    for name, gains in (("keep", keep), ("gain", gain)):
        if gains.dtype not in (torch.float32, torch.float64) or tuple(gains.shape) != (x.shape[-3],):
            yield f"{name} is {gains.dtype} {tuple(gains.shape)}; expected fp32 [{x.shape[-3]}], one value per frame"
    yield from _filter_fits(x.shape[-3:], cutoff_space, cutoff_time, butterworth_order)


@op(requires=_refresh_fits)
def spectral_refresh(
    x: Tensor, fresh: Tensor, keep: Tensor, gain: Tensor, cutoff_space: float, cutoff_time: float,
    butterworth_order: int,
) -> Tensor:  # fmt: skip
    """High frequencies of a long noise refreshed frame by frame; the low ones, which carry identity, stay.

    out[t] = x[t] + (keep[t] - 1) H(x)[t] + gain[t] H(fresh)[t] with H = 1 - L of spectral_blend. The gains belong to
    times and are applied after the inverse transform.

    Shapes     x, fresh [..., T, h, w], all sizes even or odd  keep, gain [T]
    Args       x, fresh one floating dtype;  keep, gain fp32;  cut-offs positive;  butterworth_order 0 for the Gaussian
    Returns    [..., T, h, w], dtype of x
    Numerics   fp32, one rounding at the end; both tensors share one complex transform pair
    Gradient   x, fresh, keep, gain
    Errors     ValueError on shape or dtype disagreement, cut-offs that are not positive, a negative order
    Source     Zhang et al. 2025 (VideoMerge), long noise initialisation
    """
    axes = (-3, -2, -1)
    half = low_pass(x.shape[-3:], cutoff_space, cutoff_time, butterworth_order, x.device)
    columns = torch.arange(x.shape[-1], device=x.device)
    mask = half[..., torch.minimum(columns, x.shape[-1] - columns)]  # [T, h, w]; the mask is even
    pair = torch.complex(wide(x), wide(fresh))
    filtered = torch.fft.ifftn(torch.fft.fftn(pair, dim=axes) * (1 - mask).to(wide(x).dtype), dim=axes)
    keeps, gains = (g.to(filtered.real.dtype)[:, None, None] for g in (keep, gain))
    mixed: Tensor = wide(x) + (keeps - 1) * filtered.real + gains * filtered.imag
    return mixed.to(x.dtype)


spectral_refresh_backward = spectral_refresh.differentiate("x", "fresh", "keep", "gain")
