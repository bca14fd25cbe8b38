"""Drawing the next token."""

import math
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor

from kvkeye.ops._op import op
from kvkeye.utils import philox

_PER_ROW = {
    "temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32,
    "repetition": torch.float32, "presence": torch.float32, "frequency": torch.float32, "num_prompt": torch.int32,
    "seeds": torch.int64, "positions": torch.int64, "sample_index": torch.int64,
}  # fmt: skip


def _rows_fit(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, repetition: Tensor,
    presence: Tensor, frequency: Tensor, history: Tensor, cu_history: Tensor, num_prompt: Tensor, seeds: Tensor,
    positions: Tensor, sample_index: Tensor, mask: Optional[Tensor],
) -> Iterator[str]:  # fmt: skip
    if logits.dim() != 2 or logits.shape[1] == 0:
        yield f"logits is {tuple(logits.shape)}; expected [B, V]"
        return
    yield from settings_fit(locals(), logits.shape[0], logits.shape[0])


def settings_fit(given: dict[str, Any], batch: int, rows: int) -> Iterator[str]:
    """What is wrong with the settings of `batch` draws and the mask of `rows` rows of logits, by argument name."""
    for name, dtype in _PER_ROW.items():
        tensor = given[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != (batch,):
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} [{batch}]"
    cu_history, history, mask = given["cu_history"], given["history"], given["mask"]
    if cu_history.dtype != torch.int32 or tuple(cu_history.shape) != (batch + 1,):
        yield f"cu_history is {cu_history.dtype} {tuple(cu_history.shape)}; expected int32 [{batch + 1}]"
    if history.dtype != torch.int32 or history.dim() != 1:
        yield f"history is {history.dtype} {tuple(history.shape)}; expected int32 [S]"
    words = -(-given["logits"].shape[1] // 32)
    if mask is not None and (mask.dtype != torch.int32 or tuple(mask.shape) != (rows, words)):
        yield f"mask is {mask.dtype} {tuple(mask.shape)}; expected int32 [{rows}, {words}]"


@op(requires=_rows_fit)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    history: Tensor,
    cu_history: Tensor,
    num_prompt: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sample_index: Tensor,
    mask: Optional[Tensor],
) -> Tensor:
    """Draws one token per row; a row's draw does not depend on the other rows.

    Order: mask, repetition, presence and frequency penalties, temperature, top-k, top-p, min-p, inverse CDF in
    vocabulary order with the Philox number of (seed, position, sample index). Ties keep the lower id.

    Shapes     logits [B, V]; history [S] and cu_history [B + 1]: row b's past tokens, its prompt's num_prompt[b]
               first; mask [B, ceil(V / 32)] or None; everything else [B]
    Args       logits floating;  temperature fp32, 0 takes the maximum;  top_k int32, 0 is off;  top_p fp32 in (0, 1];
               min_p fp32 in [0, 1];  repetition fp32 > 0, over prompt and output;  presence, frequency fp32, over
               the output;  seeds, positions, sample_index int64;  mask int32 bits, set where allowed
    Returns    [B] int64; -1 where the row holds NaN or +inf, or nothing finite is allowed
    Numerics   fp64 sums in vocabulary order (after top-p: in order of probability)
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Keskar et al. 2019 (repetition); Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p);
               Nguyen et al. 2024 (min-p); Salmon et al. 2011 (Philox)
    """
    bounds = cu_history.tolist()
    rows = []
    for b in range(logits.shape[0]):
        row = logits[b].double()
        if mask is not None:
            row = keep_allowed(row, mask[b])
        past = history[bounds[b] : bounds[b + 1]].long()
        row = penalise(row, past, int(num_prompt[b]), float(repetition[b]), float(presence[b]), float(frequency[b]))
        u = philox.uniform(int(seeds[b]), int(positions[b]), philox.SAMPLE, int(sample_index[b]))
        found = masses(row, float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b]))
        rows.append(found if isinstance(found, int) else pick(found, u))
    return torch.tensor(rows, dtype=torch.int64, device=logits.device)


sample.fake(lambda logits, *rest: torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device))


def keep_allowed(row: Tensor, words: Tensor) -> Tensor:
    """-inf where the bit of a token is not set. row [V], words [ceil(V / 32)]."""
    bits = words[:, None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return row.masked_fill(~bits.flatten()[: row.shape[0]].bool(), -math.inf)


def penalise(
    row: Tensor, past: Tensor, num_prompt: int, repetition: float, presence: float, frequency: float
) -> Tensor:
    """row [V] fp64 after the penalties for the tokens of `past`, of which the first num_prompt are the prompt."""
    if past.numel() == 0:
        return row
    seen = torch.zeros_like(row, dtype=torch.bool)
    seen[past] = True
    if repetition != 1.0:
        row = torch.where(seen, torch.where(row > 0, row / repetition, row * repetition), row)
    if presence != 0.0 or frequency != 0.0:
        counts = torch.bincount(past[num_prompt:], minlength=row.shape[0]).double()
        row = torch.where(counts > 0, row - frequency * counts - presence, row)
    return row


def masses(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> int | Tensor:
    """What may be drawn, [V] relative to the likeliest token and 0 elsewhere; or the token itself where nothing is left
    to chance, -1 for none. row [V] fp64."""
    peak = float(row.max())
    if not math.isfinite(peak) or bool(row.isnan().any()):
        return -1
    if temperature == 0.0:
        return int((row == peak).nonzero()[0])
    # Divided before the subtraction, as a reader would write softmax(logits / temperature).
    probability = torch.exp(row / temperature - peak / temperature)
    keep = torch.ones_like(row, dtype=torch.bool)
    if 0 < top_k < row.shape[0] or top_p < 1.0:
        ranked, order = torch.sort(probability, descending=True, stable=True)
        kept = torch.ones_like(keep)
        if 0 < top_k < row.shape[0]:
            kept[top_k:] = False
        if top_p < 1.0:
            # The token that crosses the threshold stays: the mass before it is below top_p.
            mass = torch.cumsum(ranked * kept, 0)
            kept &= mass - ranked < top_p * mass[-1]
            kept[0] = True
        keep = torch.zeros_like(keep).scatter(0, order, kept)
    keep &= probability >= min_p  # the largest probability is exp(0) = 1
    return probability * keep


def pick(mass: Tensor, u: float) -> int:
    """The first token whose cumulated mass exceeds u times the total, by inverse CDF in vocabulary order. mass [V]."""
    cumulated = torch.cumsum(mass, 0)
    index = int((cumulated <= u * float(cumulated[-1])).sum())
    return min(index, int(mass.nonzero()[-1]))


def vocabulary_too_large(logits: Tensor, *rest: object) -> Iterator[str]:
    """Why the GPU kernels cannot draw from such rows."""
    if logits.shape[1] > 1 << 20:
        yield f"the vocabulary has {logits.shape[1]} tokens; the GPU kernel takes at most {1 << 20}"


sample.implement("cpp")
sample.implement("cuda", refuses=vocabulary_too_large)
