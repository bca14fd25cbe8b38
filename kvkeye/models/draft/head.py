"""The network of an EAGLE-3 style head (Li et al. 2025, section 3): features and embeddings in, draft logits out.

Row t takes what the target, or the head itself, made of the tokens before t, and the embedding of token t; it gives
the features for row t + 1 and the logits of token t + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvkeye.layers import Context, Linear, RMSNorm, SelfAttention, SwiGLU
from kvkeye.models.draft.config import HeadConfig


class HeadLayer(nn.Module):
    """A decoder layer over the normalised embedding beside the normalised features; these are its residual stream."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = SelfAttention(
            size, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.mrope_section,
            config.rope_theta, eps, layer_index=0, input_size=2 * size,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = SwiGLU(size, config.intermediate_size)

    def join(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        """[T, H] each -> [T, 2 H], what attention sees."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], -1)

    def finish(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """[T, H] each -> [T, H], from attention's output on."""
        x, residual = self.post_attention_layernorm.add(attended, hidden)
        return self.mlp(x, residual)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor, embeds: Tensor, positions: Tensor, context: Context) -> Tensor:
        """hidden, embeds [T, H], positions [3, T] int64 -> [T, H]."""
        return self.finish(self.self_attn(self.join(hidden, embeds), positions, context), hidden)


class DraftHead(nn.Module):
    """`fuse` the target's features once, then `forward` as often as tokens are proposed, and `logits`.

    token_ids  [Vd] int64: the target's id of each token that the head knows
    """

    token_ids: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = HeadLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("token_ids", torch.arange(config.draft_vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def fuse(self, features: Tensor) -> Tensor:
        """The target's features of three layers side by side, [T, 3 H] -> [T, H]."""
        return self.fc(features)  # type: ignore[no-any-return]

    def forward(self, hidden: Tensor, embeds: Tensor, positions: Tensor, context: Context) -> Tensor:
        """hidden, embeds [T, H], positions [3, T] int64 -> [T, H], the hidden states of the rows that follow."""
        return self.midlayer(hidden, embeds, positions, context)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, Vd]; entry i is of token `token_ids[i]`."""
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]

    def parts(self) -> list[Tensor]:
        """The weights as ops.draft_tree takes them."""
        layer, attention = self.midlayer, self.midlayer.self_attn
        return [
            _matrix(self.fc), layer.input_layernorm.weight, layer.hidden_norm.weight, _matrix(attention.qkv_proj),
            attention.q_norm, attention.k_norm, _matrix(attention.o_proj), layer.post_attention_layernorm.weight,
            _matrix(layer.mlp.gate_up_proj), _matrix(layer.mlp.down_proj), self.norm.weight, _matrix(self.lm_head),
        ]  # fmt: skip

    @property
    def sizes(self) -> tuple[list[int], int, int, float, float]:
        """What ops.draft_tree asks about them: sections, query heads, inner size, theta, eps."""
        c = self.config
        return list(c.mrope_section), c.num_attention_heads, c.intermediate_size, c.rope_theta, c.rms_norm_eps


def _matrix(linear: Linear) -> Tensor:
    """As it is, packed or plain."""
    return linear.plain_weight() if linear.packed is None else linear.packed
