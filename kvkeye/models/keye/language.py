"""The language model: Qwen3 with sectioned rotary positions. Knows embeddings, positions and contexts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers import Context, Embedding, Linear, PagedContext, RMSNorm, SelfAttention, SwiGLU
from kvkeye.models.keye.config import TextConfig


@dataclass(frozen=True)
class _AsOne:
    """What a packed layer gives to `ops.decoder_layer` in every step; a module looks attributes up by Python.

    last: the packed matrix by which it is seen that the layer was packed anew.
    """

    last: Tensor
    layer_index: int
    weights: list[Any]
    scales: list[Tensor]
    settings: tuple[Any, ...]

    @staticmethod
    def of(layer: DecoderLayer, last: Tensor) -> _AsOne:
        attention, mlp = layer.self_attn, layer.mlp
        matrices = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        qkv, out, gate_up, down = (matrix.packed for matrix in matrices)
        weights = [
            layer.input_layernorm.weight, qkv, attention.q_norm, attention.k_norm, out,
            layer.post_attention_layernorm.weight, gate_up, down,
        ]  # fmt: skip
        settings = (
            attention.sections, attention.num_q_heads, mlp.down_proj.inputs, attention.rope_theta, attention.eps,
            attention.softmax_scale,
        )  # fmt: skip
        scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
        return _AsOne(last, attention.layer_index, weights, scales, settings)


class DecoderLayer(nn.Module):
    """Pre-norm layer over a residual stream that is added to inside the norms.

    Over a paged cache, with packed weights, it is one op: calls are a good part of a small step. `in_parts` forbids it.
    """

    def __init__(self, config: TextConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.mrope_section,
            config.rope_theta,
            config.rms_norm_eps,
            layer_index,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.in_parts = False
        self._one: _AsOne | None = None

    def forward(self, x: Tensor, residual: Tensor | None, positions: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """x [T, H] is what the layer before adds to `residual` [T, H]; the same pair is returned."""
        if not self.in_parts and isinstance(context, PagedContext) and not context.k_scales:
            packed = self.mlp.down_proj.packed
            if self._one is None or self._one.last is not packed:
                self._one = None if packed is None else _AsOne.of(self, packed)
            if self._one is not None:
                return self._as_one(x, residual, positions, context, self._one)
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, positions, context)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual

    @staticmethod
    def _as_one(
        x: Tensor, residual: Tensor | None, positions: Tensor, context: PagedContext, one: _AsOne
    ) -> tuple[Tensor, Tensor]:
        x, residual = ops.decoder_layer(
            x, residual, positions, one.weights, one.scales, context.k_caches[one.layer_index],
            context.v_caches[one.layer_index], context.block_table, context.cu_seqlens_q, context.context_lens,
            context.slot_mapping, context.tree_mask, *one.settings,
        )  # fmt: skip
        return x, residual


class LanguageModel(nn.Module):
    """Decoder layers between the embedding table and the output head."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, head=config.tie_word_embeddings)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, embeds: Tensor, positions: Tensor, context: Context) -> Tensor:
        """embeds [T, H], positions [3, T] int64 -> normalised hidden states [T, H]."""
        return self.forward_features(embeds, positions, context)[0]

    def forward_features(
        self, embeds: Tensor, positions: Tensor, context: Context, depths: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """As forward, and the residual stream [T, H] after as many layers as each of `depths` says, ascending."""
        x, residual = embeds, None
        features = [embeds] if 0 in depths else []
        for depth, layer in enumerate(self.layers, 1):
            x, residual = layer(x, residual, positions, context)
            if depth in depths:
                features.append(x + residual)
        if residual is None:
            return self.norm(x), features
        return self.norm.add(x, residual)[0], features

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, V], in the dtype of `hidden`."""
        if self.lm_head is not None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        return self.embed_tokens.logits(hidden)
