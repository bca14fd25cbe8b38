"""Speculative decoding: checking proposed tokens against the model."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._op import op
from kvkeye.ops.sampling import keep_allowed, masses, penalise, pick, settings_fit, vocabulary_too_large
from kvkeye.utils import philox

MAX_TREE_ROWS = 64


def _trees_fit(
    logits: Tensor, draft_tokens: Tensor, tree_parents: Tensor, cu_rows: Tensor, draft_probs: Optional[Tensor],
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, repetition: Tensor, presence: Tensor,
    frequency: Tensor, history: Tensor, cu_history: Tensor, num_prompt: Tensor, seeds: Tensor, positions: Tensor,
    sample_index: Tensor, mask: Optional[Tensor],
) -> Iterator[str]:  # fmt: skip
    if logits.dim() != 2 or logits.shape[1] == 0:
        yield f"logits is {tuple(logits.shape)}; expected [R, V]"
        return
    given, rows = locals(), logits.shape[0]
    for name, dtype in (("draft_tokens", torch.int64), ("tree_parents", torch.int32)):
        if given[name].dtype != dtype or tuple(given[name].shape) != (rows,):
            yield f"{name} is {given[name].dtype} {tuple(given[name].shape)}; expected {dtype} [{rows}]"
    if cu_rows.dtype != torch.int32 or cu_rows.dim() != 1 or cu_rows.shape[0] == 0:
        yield f"cu_rows is {cu_rows.dtype} {tuple(cu_rows.shape)}; expected int32 [B + 1]"
        return
    if draft_probs is not None and (draft_probs.dtype != torch.float32 or draft_probs.shape != logits.shape):
        yield f"draft_probs is {draft_probs.dtype} {tuple(draft_probs.shape)}; expected float32 {list(logits.shape)}"
    yield from settings_fit(given, cu_rows.shape[0] - 1, rows)


@op(requires=_trees_fit)
def verify_draft(
    logits: Tensor,
    draft_tokens: Tensor,
    tree_parents: Tensor,
    cu_rows: Tensor,
    draft_probs: Optional[Tensor],
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the next tokens of each sequence down a tree of proposals, as far as what is drawn was proposed.

    Row 0 of a tree is the last known token, every other row a proposal after its parent; a chain is a tree. At a row a
    token is drawn from its logits with the settings of `sample`, the tokens drawn before it being part of the
    history. If a child of the row has that token the walk goes on there; otherwise the token is the last one.

    Without `draft_probs` a draw is that of `sample` for its (seed, position, sample index): the tokens are those of
    plain decoding, to the bit, whatever was proposed. This is the rule for proposals without chance (n-gram, the
    maximum of a head), where no other rule accepts more. With `draft_probs`, row r's children were drawn from
    draft_probs[r], each without those before it; a child x is accepted if u q(x) < p(x), else p becomes the
    normalised positive part of p - q and q loses x, and what is left at the end is sampled: the distribution is p's.
    A child of probability zero, or equal to an earlier one, is passed over.

    Shapes     logits [R, V], one row per tree row;  draft_tokens, tree_parents [R];  cu_rows [B + 1] bounds of the
               trees;  draft_probs [R, V] or None;  mask [R, ceil(V / 32)] or None;  history [S];  cu_history
               [B + 1];  everything else [B]
    Args       as in `sample`;  draft_tokens int64, not read at row 0;  tree_parents int32, row of the same tree, -1
               at row 0, parents first;  cu_rows int32, at most 64 rows a tree;  draft_probs fp32;  positions int64,
               of the first drawn token
    Returns    tokens [R] int64, the drawn ones of tree b from cu_rows[b], the last one -1 where a row holds NaN or
               +inf or nothing finite is allowed;  rows [R] int64, from whose logits each was drawn;  counts [B] int64;
               what lies behind a tree's count is -1
    Numerics   those of `sample`; acceptance in fp64; uniform numbers of (seed, position, kind of draw, sample index)
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Leviathan et al. 2023, algorithm 1; trees: Miao et al. 2024 (SpecInfer), section 4.2; without
               replacement: Jeon et al. 2024
    """
    total = logits.shape[0]
    tokens = torch.full((total,), -1, dtype=torch.int64, device=logits.device)
    rows = torch.full((total,), -1, dtype=torch.int64, device=logits.device)
    counts = torch.zeros(cu_rows.shape[0] - 1, dtype=torch.int64, device=logits.device)
    bounds, past_bounds = cu_rows.tolist(), cu_history.tolist()
    parents, proposed = tree_parents.tolist(), draft_tokens.tolist()
    for b in range(len(bounds) - 1):
        first, size = bounds[b], bounds[b + 1] - bounds[b]
        past = history[past_bounds[b] : past_bounds[b + 1]].tolist()
        drawn: list[int] = []
        at = 0 if size else -1
        while at >= 0:
            row = logits[first + at].double()
            if mask is not None:
                row = keep_allowed(row, mask[first + at])
            seen = torch.tensor(past + drawn, dtype=torch.int64, device=logits.device)
            row = penalise(row, seen, int(num_prompt[b]), float(repetition[b]), float(presence[b]), float(frequency[b]))
            children = [child for child in range(at + 1, size) if parents[first + child] == at]
            offered = [proposed[first + child] for child in children]
            key = (int(seeds[b]), int(positions[b]) + len(drawn), int(sample_index[b]))
            found = masses(row, float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b]))
            if isinstance(found, int):
                token = found
            elif draft_probs is None or not children:
                token = pick(found, philox.uniform(key[0], key[1], philox.SAMPLE, key[2]))
            else:
                token = _accept(found, draft_probs[first + at].double(), offered, key)
            tokens[first + len(drawn)], rows[first + len(drawn)] = token, first + at
            drawn.append(token)
            at = children[offered.index(token)] if token in offered else -1
        counts[b] = len(drawn)
    return tokens, rows, counts


def _accept(target: Tensor, draft: Tensor, offered: list[int], key: tuple[int, int, int]) -> int:
    """The first child that is accepted, or a draw from what they leave. target and draft [V], sums need not be 1."""
    seed, position, index = key
    target, draft = target.clone(), draft.clone()
    for sibling, token in enumerate(offered):
        mass = float(draft.sum())
        if not (float(draft[token]) > 0 and mass > 0):
            continue
        p, q = target / target.sum(), draft / mass
        if philox.uniform(seed, position, philox.accept_draw(sibling), index) * float(q[token]) < float(p[token]):
            return token
        target = (p - q).clamp(min=0)
        if not float(target.sum()) > 0:  # only rounding kept it from being accepted
            return token
        draft[token] = 0
    return pick(target, philox.uniform(seed, position, philox.SAMPLE, index))


def _shapes(
    logits: Tensor, draft_tokens: Tensor, tree_parents: Tensor, cu_rows: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    def ints(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int64, device=logits.device)

    return ints(logits.shape[0]), ints(logits.shape[0]), ints(cu_rows.shape[0] - 1)


verify_draft.fake(_shapes)
verify_draft.implement("cpp")
verify_draft.implement("cuda", refuses=vocabulary_too_large)
