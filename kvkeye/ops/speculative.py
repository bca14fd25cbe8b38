"""Speculative decoding: proposing tokens by a draft head, and checking proposals against the model."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._draft_head import HEAD_WEIGHTS, Head, Texts
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


def _head_fits(
    features: Tensor, embeds: Tensor, vocabulary: Tensor, weights: list[Tensor], k_cache: Tensor, v_cache: Tensor,
    block_table: Tensor, cu_seqlens: Tensor, context_lens: Tensor, positions: Tensor, sections: list[int],
    num_q_heads: int, intermediate: int, theta: float, eps: float, depth: int, width: int, min_score: float,
) -> Iterator[str]:  # fmt: skip
    if vocabulary.dim() != 2 or vocabulary.shape[0] == 0:
        yield f"vocabulary is {tuple(vocabulary.shape)}; expected [Vd, H]"
        return
    rows, size = positions.shape[0], vocabulary.shape[1]
    for name, tensor, shape in (("features", features, (rows, 3 * size)), ("embeds", embeds, (rows, size))):
        if tuple(tensor.shape) != shape or tensor.dtype != vocabulary.dtype:
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {vocabulary.dtype} {list(shape)}"
    if len(weights) != len(HEAD_WEIGHTS):
        yield f"weights are {len(weights)}; expected {len(HEAD_WEIGHTS)}: {', '.join(HEAD_WEIGHTS)}"
    batch = context_lens.shape[0]
    for name, tensor, dims, kind in (
        ("block_table", block_table, (batch, block_table.shape[-1]), torch.int32),
        ("cu_seqlens", cu_seqlens, (batch + 1,), torch.int32),
        ("context_lens", context_lens, (batch,), torch.int32),
        ("positions", positions, (rows,), torch.int64),
    ):
        if tensor.dtype != kind or tuple(tensor.shape) != dims:
            yield f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {kind} {list(dims)}"
    if depth < 1 or width < 1 or depth * width >= MAX_TREE_ROWS:
        yield f"depth is {depth}, width {width}; expected at least 1 each and a product below {MAX_TREE_ROWS}"


@op(mutates=("k_cache", "v_cache"), requires=_head_fits)
def draft_tree(
    features: Tensor,
    embeds: Tensor,
    vocabulary: Tensor,
    weights: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    positions: Tensor,
    sections: list[int],
    num_q_heads: int,
    intermediate: int,
    theta: float,
    eps: float,
    depth: int,
    width: int,
    min_score: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest continuations of each sequence by an EAGLE-3 style head: a tree of at most `width` nodes a level.

    The head is one decoder layer over [norm(embedding), norm(state)] on the residual stream of the state. The state of
    a row is `fuse` of the target's features before its token, or what the head gave for the row before it. First the
    rows that the head has not seen are computed, the newest of each sequence; the last one proposes. Children of a
    level are the `width` best by score, the product of the head's probabilities along the branch, of those with at
    least `min_score`; they are computed as rows behind the sequence's tokens, each seeing its branch.

    Shapes     features [T, 3 H]  embeds [T, H]  vocabulary [Vd, H]  k_cache, v_cache [N, Hkv, P, D]
               block_table [B, M]  cu_seqlens [B + 1] bounds of the rows  context_lens [B]  positions [T]
    Args       weights in the order of HEAD_WEIGHTS, matrices [O, K] or as pack_weight gives them (gate_up with
               parts=2), norms as vectors;  vocabulary: the embeddings of the tokens that the head knows;
               block_table int32, with room for depth * width nodes behind context_lens;  context_lens int32 tokens, the
               rows included;  positions int64 rotary positions, of a node that of the last row and its level on
    Returns    tokens [B, depth * width] int64, rows of `vocabulary`, by level and then by score, -1 behind the last;
               parents likewise, a node's number or -1;  scores likewise, fp32, 0 behind the last;
               k_cache and v_cache are changed
    Numerics   those of the ops it is made of; probabilities in fp32; a row with NaN proposes nothing
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     Li et al. 2025 (EAGLE-3), section 3; choice of nodes: Li et al. 2024 (EAGLE-2), section 4.1
    """
    head = Head(dict(zip(HEAD_WEIGHTS, weights)), k_cache, v_cache, sections, num_q_heads, intermediate, theta, eps)
    texts = Texts(block_table, context_lens, cu_seqlens, positions)
    states = head.known(features, embeds, texts)
    if width == 1:
        tokens, chances = head.chains(states, vocabulary, texts, depth, min_score)
        above = torch.arange(-1, depth - 1, device=features.device)
        return tokens, above.where(tokens >= 0, -1), chances.float()
    tokens = torch.full((len(states), depth * width), -1, dtype=torch.int64, device=features.device)
    parents, scores = tokens.clone(), torch.zeros(tokens.shape, device=features.device)
    for b in range(len(states)):
        nodes = head.grow(states[b : b + 1], vocabulary, texts.one(b), depth, width, min_score)
        for i, (token, parent, score) in enumerate(nodes):
            tokens[b, i], parents[b, i], scores[b, i] = token, parent, score
    return tokens, parents, scores


draft_tree.fake(
    lambda features, embeds, vocabulary, weights, k_cache, v_cache, block_table, cu_seqlens, context_lens, positions,
    sections, num_q_heads, intermediate, theta, eps, depth, width, min_score: (
        positions.new_empty((context_lens.shape[0], depth * width)),
        positions.new_empty((context_lens.shape[0], depth * width)),
        positions.new_empty((context_lens.shape[0], depth * width), dtype=torch.float32),
    )
)  # fmt: skip


def _plain_weights(
    features: Tensor, embeds: Tensor, vocabulary: Tensor, weights: list[Tensor], *rest: object
) -> Iterator[str]:
    if any(weight.dim() == 2 for weight in weights):
        yield "a weight is plain; cpp takes them as pack_weight gives them"


draft_tree.implement("cpp", refuses=_plain_weights)
