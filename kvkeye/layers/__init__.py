"""Layers that models share: `torch.nn` modules over `kvkeye.ops`. They know sizes, never a checkpoint's names."""

from kvkeye.layers.attention import PatchAttention, SelfAttention
from kvkeye.layers.context import Context, PackedContext, PagedContext
from kvkeye.layers.embedding import Embedding
from kvkeye.layers.large_pages import LargePages
from kvkeye.layers.linear import Linear
from kvkeye.layers.mlp import GeluMLP, SwiGLU
from kvkeye.layers.norm import LayerNorm, RMSNorm
from kvkeye.layers.packed import PackableWeight, pack_weights, quantize_weights

__all__ = [
    "Context",
    "Embedding",
    "GeluMLP",
    "LargePages",
    "LayerNorm",
    "Linear",
    "PackableWeight",
    "PackedContext",
    "PagedContext",
    "PatchAttention",
    "RMSNorm",
    "SelfAttention",
    "SwiGLU",
    "pack_weights",
    "quantize_weights",
]
