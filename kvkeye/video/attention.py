"""kvkeye's attention in diffusers' Wan transformer: the whole clip, or tiles of frames whose outputs are blended.

Self- and cross-attention have different processors; cross-attention keeps the one that it came with. Both directions go
through the project's ops, so a transformer with these processors also trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel
from torch import Tensor

from kvkeye import ops
from kvkeye.errors import ConfigError
from kvkeye.video.tiles import TilePlan


@dataclass
class TilePlace:
    """Where the processors of one transformer find the tiles of the pass at hand; None: the whole clip is one."""

    starts: Tensor | None = None
    weights: Tensor | None = None
    num_frames: int = 1

    def enter(self, plan: TilePlan, window: str, device: torch.device) -> None:
        self.starts = torch.tensor(plan.starts, dtype=torch.int32, device=device)
        self.weights = plan.weights(window).float().to(device)
        self.num_frames = plan.num_frames

    def leave(self) -> None:
        self.starts = self.weights = None
        self.num_frames = 1


class TileSelfAttention:
    """Processor of a `WanAttention` over video tokens, in (frame, row, column) order.

    Rotary positions are those of the whole clip: scores inside a tile depend on differences alone.
    """

    _attention_backend = None  # read by diffusers
    _parallel_config = None

    def __init__(self, place: TilePlace) -> None:
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is None and attention_mask is None, "self-attention over whole clips"
        q, k, v = _qkv(attn, hidden_states)  # [B, S, H, D] each
        if rotary_emb is not None:
            q, k = (_rotated(x, *rotary_emb) for x in (q, k))
        starts, weights = self.place.starts, self.place.weights
        if starts is None or weights is None:
            starts = torch.zeros(1, dtype=torch.int32, device=q.device)
            weights = torch.ones(1, self.place.num_frames, device=q.device)
        o, _ = ops.tile_attention(q, k, v, starts, weights, self.place.num_frames, 0, q.shape[-1] ** -0.5)
        out: Tensor = attn.to_out[1](attn.to_out[0](o.flatten(2)))
        return out


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (attn.norm_q(q), attn.norm_k(k), v))
    return q, k, v


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs turned by their angles; cos and sin [1, S, 1, D] hold each angle twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).type_as(x)


def self_attentions(module: Any) -> list[Any]:
    """The self-attention layers of a Wan transformer. Raises ConfigError for any other module."""
    if not isinstance(module, WanTransformer3DModel):
        raise ConfigError(
            f"attention: got a {type(module).__name__}; attention processors exist for WanTransformer3DModel. Use "
            "mode='latent' with other models."
        )
    return [part for part in module.modules() if isinstance(part, WanAttention) and not part.is_cross_attention]


def use_kvkeye_attention(module: Any, place: TilePlace | None = None) -> Callable[[], None]:
    """Sends the self-attention of a Wan transformer through `ops.tile_attention`; returns what undoes it.

    Args     place the tiles of the pass at hand; None: always the whole clip
    Raises   ConfigError: not a Wan transformer
    """
    place = place or TilePlace()
    layers = self_attentions(module)
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.set_processor(TileSelfAttention(place))

    def undo() -> None:
        for layer, processor in zip(layers, before):
            layer.set_processor(processor)

    return undo
