"""Scores of candidates in a chunk rollout, without decoding them."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _candidates_fit(x: Tensor, v: Tensor, sigma: float, guide: Tensor, grid: int) -> Iterator[str]:
    if x.dim() != 5:
        yield f"x is {tuple(x.shape)}; expected [N, C, T, h, w]"
        return
    if v.shape != x.shape or v.dtype != x.dtype:
        yield f"v is {v.dtype} {tuple(v.shape)}; expected that of x, {x.dtype} {tuple(x.shape)}"
    if guide.dtype not in (torch.float32, torch.float64) or tuple(guide.shape) != (x.shape[1], *x.shape[3:]):
        yield f"guide is {guide.dtype} {tuple(guide.shape)}; expected fp32 {[x.shape[1], *x.shape[3:]]}"
    if not 2 <= grid <= min(x.shape[3:]):
        yield f"grid is {grid}; expected 2 to the frame's shorter side, {min(x.shape[3:])}"


def _features(frames: Tensor, grid: int) -> Tensor:
    """[..., C, h, w] -> [..., C, grid, grid]: cell means less their channel's mean; cells differ by at most a row."""
    for axis in (-2, -1):
        size = frames.shape[axis]
        bounds = [i * size // grid for i in range(grid + 1)]
        cells = [frames.narrow(axis, a, b - a).mean(axis) for a, b in itertools.pairwise(bounds)]
        frames = torch.stack(cells, axis)
    return frames - frames.mean((-2, -1), keepdim=True)


@op(requires=_candidates_fit)
def score_candidates(x: Tensor, v: Tensor, sigma: float, guide: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of a candidate's score against the frame that its chunk continues, one value per frame.

    With the clean prediction y = x - sigma v: `similarity` is the cosine of pooled frames, a pooled frame being the
    means of grid x grid cells per channel less the channel's mean over the cells; `motion` is mean |y_t - y_(t-1)| with
    y_(-1) = guide, so motion[:, 0] is the seam; `drift` is the root mean square over channels of the difference of
    the channel means of frame and guide. A frozen clip has the best similarity: rank by it above a floor on motion.

    Shapes     x, v [N, C, T, h, w], N candidates  guide [C, h, w]
    Args       x floating, v of its dtype;  sigma 0 where x is the clean prediction;  guide fp32;  grid cells per side
    Returns    similarity, motion, drift [N, T] fp32; similarity is 0 where a pooled frame is flat
    Numerics   fp32
    Gradient   x, v, guide
    Errors     ValueError on shape or dtype disagreement, a grid outside 2..min(h, w)
    Source     Xiong et al. 2024 (k-step search), on latents; prediction of flow matching: Lipman et al. 2023
    """
    clean = wide(x) - sigma * wide(v)
    frames = clean.transpose(1, 2)  # [N, T, C, h, w]
    own, target = _features(frames, grid).flatten(2), _features(wide(guide), grid).flatten()
    norms = own.norm(dim=-1) * target.norm()
    similarity = (own @ target) / torch.where(norms > 0, norms, torch.ones_like(norms))
    before = torch.cat((wide(guide).expand(x.shape[0], 1, *guide.shape), frames[:, :-1]), 1)
    motion = (frames - before).abs().mean((2, 3, 4))
    drift = (frames.mean((3, 4)) - wide(guide).mean((1, 2))).square().mean(-1).sqrt()
    return similarity, motion, drift


score_candidates.fake(
    lambda x, v, sigma, guide, grid: tuple(wide(x).new_empty(x.shape[0], x.shape[2]) for _ in range(3))
)
score_candidates.implement("cpp")
score_candidates.implement("triton", "rollout:score_candidates")
score_candidates_backward = score_candidates.differentiate("x", "v", "guide")
