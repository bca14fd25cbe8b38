"""The reference of ops.draft_tree, made of the ops of a decoder layer: chains side by side, trees one by one."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._projections import gated, project
from kvkeye.ops.attention import paged_attention
from kvkeye.ops.kv_cache import qk_norm_mrope_append
from kvkeye.ops.norm import add_rms_norm, rms_norm

#: The order of draft_tree's `weights`.
HEAD_WEIGHTS = (
    "fuse", "input_norm", "hidden_norm", "qkv", "q_norm", "k_norm", "out", "post_norm", "gate_up", "down", "norm",
    "head",
)  # fmt: skip
Node = tuple[int, int, float]  # row of the vocabulary, parent or -1, score


@dataclass(frozen=True)
class Texts:
    """Sequences: block tables [B, M], tokens [B], bounds [B + 1] of their new rows, rotary positions [T] of these."""

    tables: Tensor
    lengths: Tensor
    bounds: Tensor
    positions: Tensor

    @property
    def ends(self) -> Tensor:
        """[B] int64: the last row of each."""
        return self.bounds[1:].long() - 1

    def one(self, b: int) -> "Text":
        return Text(self.tables[b : b + 1], int(self.lengths[b]), int(self.positions[self.ends[b]]))


@dataclass(frozen=True)
class Text:
    """A sequence: its blocks [1, M], its tokens, and the rotary position of the last one."""

    table: Tensor
    known: int
    position: int


@dataclass(frozen=True)
class Head:
    """Weights by name, caches and sizes."""

    weights: dict[str, Tensor]
    k_cache: Tensor
    v_cache: Tensor
    sections: list[int]
    num_q_heads: int
    intermediate: int
    theta: float
    eps: float

    def known(self, features: Tensor, embeds: Tensor, texts: Texts) -> Tensor:
        """States [B, H] of the sequences' last tokens."""
        count, counts = len(features), texts.bounds.diff()
        rows = torch.arange(len(counts), device=features.device)
        owner = torch.repeat_interleave(rows, counts, output_size=count)  # [T]
        places = (texts.lengths - texts.bounds[1:])[owner] + torch.arange(count, device=features.device)
        states = project(features, self.weights["fuse"], embeds.shape[1])
        q = self._queries(states, embeds, texts.positions, self._slots(texts.tables, owner, places))
        attended = self._attend(q, texts.tables, texts.bounds, texts.lengths, None)
        return self._finish(attended, states)[texts.ends]

    def chains(self, states: Tensor, vocabulary: Tensor, texts: Texts, depth: int, low: float) -> tuple[Tensor, Tensor]:
        """Tokens and scores [B, depth] behind the last states [B, H], -1 and 0 behind the last that is likely enough.

        The host reads no value. A sequence that has ended is computed on, and writes nothing.
        """
        rows = torch.arange(len(states) + 1, dtype=torch.int32, device=states.device)
        last = texts.positions[texts.ends]
        score = torch.ones(len(states), dtype=torch.float64, device=states.device)
        tokens, scores = [], []
        for level in range(depth):
            chances, found = self._chances(states, vocabulary).max(-1)
            score = score * chances
            is_likely = score >= low  # NaN is not
            tokens.append(found.where(is_likely, -1))
            scores.append(score.where(is_likely, 0.0))
            if level + 1 == depth:
                break
            slots = self._slots(texts.tables, rows[:-1], texts.lengths + level).where(is_likely, -1)
            q = self._queries(states, vocabulary[found], last + level + 1, slots)
            states = self._finish(self._attend(q, texts.tables, rows, texts.lengths + level + 1, None), states)
        return torch.stack(tokens, 1), torch.stack(scores, 1)

    def grow(self, states: Tensor, vocabulary: Tensor, text: Text, depth: int, width: int, low: float) -> list[Node]:
        """The nodes behind a sequence whose last state is `states` [1, H], by level and then by score."""
        nodes: list[Node] = []
        masks: list[int] = []
        parents = [-1]  # of the rows of `states`: the nodes that they are
        queries: list[Tensor] = []
        for level in range(depth):
            children = self._children(states, vocabulary, nodes, parents, width, low)
            states = states[[parents.index(parent) for _, parent, _ in children]]
            parents = [len(nodes) + i for i in range(len(children))]
            for child in children:
                masks.append(1 << len(nodes) | (masks[child[1]] if child[1] >= 0 else 0))
                nodes.append(child)
            if not children or level + 1 == depth:
                break
            inputs = vocabulary[[token for token, _, _ in children]]
            axis = torch.full((len(children),), text.position + level + 1, device=states.device)
            places = torch.arange(text.known + parents[0], text.known + len(nodes), device=states.device)
            queries.append(self._queries(states, inputs, axis, self._slots(text.table, 0, places)))
            numbers = (masks, [0, len(nodes)], [text.known + len(nodes)])
            bits, bounds, lengths = (torch.tensor(values, device=states.device) for values in numbers)
            attended = self._attend(torch.cat(queries), text.table, bounds.int(), lengths.int(), bits)
            states = self._finish(attended[-len(children) :], states)
        return nodes

    def _children(
        self, states: Tensor, vocabulary: Tensor, nodes: list[Node], parents: list[int], width: int, low: float
    ) -> list[Node]:
        chances, tokens = self._chances(states, vocabulary).topk(min(width, len(vocabulary)))
        found = [
            (token, parent, chance * (nodes[parent][2] if parent >= 0 else 1.0))
            for parent, own, ids in zip(parents, chances.tolist(), tokens.tolist())
            for chance, token in zip(own, ids)
        ]
        return sorted((child for child in found if child[2] >= low), key=lambda child: -child[2])[:width]

    def _chances(self, states: Tensor, vocabulary: Tensor) -> Tensor:
        """[n, Vd]: of every token that the head knows."""
        logits = project(rms_norm(states, self.weights["norm"], self.eps), self.weights["head"], len(vocabulary))
        return wide(logits).softmax(-1)

    def _slots(self, tables: Tensor, owner: Tensor | int, places: Tensor) -> Tensor:
        """Slots [n] of the tokens `places` [n] of sequences `owner`."""
        size = self.k_cache.shape[2]
        return tables[owner, places // size].long() * size + places % size

    def _queries(self, states: Tensor, inputs: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """q [n, Hq, D]; keys and values go to `slots` of the caches, to none where that is -1."""
        w = self.weights
        x = torch.cat([rms_norm(inputs, w["input_norm"], self.eps), rms_norm(states, w["hidden_norm"], self.eps)], -1)
        qkv = project(x, w["qkv"], (self.num_q_heads + 2 * self.k_cache.shape[1]) * self.k_cache.shape[3])
        q: Tensor = qk_norm_mrope_append(
            qkv, w["q_norm"], w["k_norm"], positions.expand(3, -1), self.k_cache, self.v_cache, slots, self.sections,
            self.theta, self.eps,
        )  # fmt: skip
        return q

    def _attend(self, q: Tensor, tables: Tensor, bounds: Tensor, lengths: Tensor, bits: Optional[Tensor]) -> Tensor:
        scale = q.shape[2] ** -0.5
        o: Tensor = paged_attention(q, self.k_cache, self.v_cache, tables, bounds, lengths, bits, scale)[0]
        return o.flatten(1)

    def _finish(self, attended: Tensor, states: Tensor) -> Tensor:
        w, size = self.weights, states.shape[1]
        normed, total = add_rms_norm(project(attended, w["out"], size), states, w["post_norm"], self.eps)
        inner = gated(normed, w["gate_up"], self.intermediate)
        result: Tensor = total + project(inner, w["down"], size)
        return result
