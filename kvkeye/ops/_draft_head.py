"""The reference of ops.draft_tree: a draft head over one sequence, made of the ops of a decoder layer."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops.activation import silu_mul
from kvkeye.ops.attention import paged_attention
from kvkeye.ops.kv_cache import qk_norm_mrope_append
from kvkeye.ops.linear import packed_linear, prepacked_linear, prepacked_linear_silu_mul
from kvkeye.ops.norm import add_rms_norm, rms_norm

#: The order of draft_tree's `weights`.
HEAD_WEIGHTS = (
    "fuse", "input_norm", "hidden_norm", "qkv", "q_norm", "k_norm", "out", "post_norm", "gate_up", "down", "norm",
    "head",
)  # fmt: skip
Node = tuple[int, int, float]  # row of the vocabulary, parent or -1, score


@dataclass(frozen=True)
class Text:
    """A sequence: its blocks [1, M], its tokens, and the rotary position of the last one."""

    table: Tensor
    known: int
    position: int


def project(x: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """x W^T of a plain or a packed weight."""
    y: Tensor = packed_linear(x, weight, None) if weight.dim() == 2 else prepacked_linear(x, weight, None, outputs)
    return y


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

    def known(self, features: Tensor, embeds: Tensor, positions: Tensor, text: Text) -> Tensor:
        """States [n, H] of the sequence's last n tokens."""
        states = project(features, self.weights["fuse"], embeds.shape[1])
        q = self._queries(states, embeds, positions, text, text.known - len(positions))
        return self._finish(self._attend(q, text, text.known, None), states)

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
            queries.append(self._queries(states, inputs, axis, text, text.known + parents[0]))
            bits = torch.tensor(masks, device=states.device)
            attended = self._attend(torch.cat(queries), text, text.known + len(nodes), bits)[-len(children) :]
            states = self._finish(attended, states)
        return nodes

    def _children(
        self, states: Tensor, vocabulary: Tensor, nodes: list[Node], parents: list[int], width: int, low: float
    ) -> list[Node]:
        logits = project(rms_norm(states, self.weights["norm"], self.eps), self.weights["head"], len(vocabulary))
        chances, tokens = wide(logits).softmax(-1).topk(min(width, len(vocabulary)))
        found = [
            (token, parent, chance * (nodes[parent][2] if parent >= 0 else 1.0))
            for parent, own, ids in zip(parents, chances.tolist(), tokens.tolist())
            for chance, token in zip(own, ids)
        ]
        return sorted((child for child in found if child[2] >= low), key=lambda child: -child[2])[:width]

    def _queries(self, states: Tensor, inputs: Tensor, positions: Tensor, text: Text, place: int) -> Tensor:
        """q [n, Hq, D] of rows at `place` and behind it; their keys and values go into the caches."""
        w, size = self.weights, self.k_cache.shape[2]
        x = torch.cat([rms_norm(inputs, w["input_norm"], self.eps), rms_norm(states, w["hidden_norm"], self.eps)], -1)
        qkv = project(x, w["qkv"], (self.num_q_heads + 2 * self.k_cache.shape[1]) * self.k_cache.shape[3])
        places = torch.arange(place, place + len(x), device=x.device)
        slots = text.table[0].long()[places // size] * size + places % size
        q: Tensor = qk_norm_mrope_append(
            qkv, w["q_norm"], w["k_norm"], positions.expand(3, -1), self.k_cache, self.v_cache, slots, self.sections,
            self.theta, self.eps,
        )  # fmt: skip
        return q

    def _attend(self, q: Tensor, text: Text, context: int, bits: Optional[Tensor]) -> Tensor:
        bounds, lengths = (torch.tensor(v, dtype=torch.int32, device=q.device) for v in ([0, len(q)], [context]))
        scale = q.shape[2] ** -0.5
        o: Tensor = paged_attention(q, self.k_cache, self.v_cache, text.table, bounds, lengths, bits, scale)[0]
        return o.flatten(1)

    def _finish(self, attended: Tensor, states: Tensor) -> Tensor:
        w, size = self.weights, states.shape[1]
        normed, total = add_rms_norm(project(attended, w["out"], size), states, w["post_norm"], self.eps)
        if w["gate_up"].dim() == 2:
            inner = silu_mul(packed_linear(normed, w["gate_up"], None))
        else:
            inner = prepacked_linear_silu_mul(normed, w["gate_up"], self.intermediate)
        result: Tensor = total + project(inner, w["down"], size)
        return result
