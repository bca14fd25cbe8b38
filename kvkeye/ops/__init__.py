"""The contract of every kernel: declaration, reference, gradient, choice of implementation.

`ops.rms_norm(x, weight, eps)` runs the first implementation that accepts the call; `ops.rms_norm.explain(...)`
says which and why; `with ops.use_backends("cpp"):` forces one. `python -m kvkeye.ops` prints the support table.
"""

from kvkeye.ops._op import OPS, Implementation, Op, op
from kvkeye.ops._policy import Choices, settle, use_backends
from kvkeye.ops.activation import gelu, gelu_backward, silu_mul, silu_mul_backward
from kvkeye.ops.attention import (
    merge_attention_states,
    merge_attention_states_backward,
    paged_attention,
    varlen_attention,
    varlen_attention_backward,
)
from kvkeye.ops.decoder import decoder_layer
from kvkeye.ops.frames import hsv_patches, patch_products
from kvkeye.ops.int8_linear import (
    dequantize_weight,
    int8_linear,
    int8_linear_add,
    int8_linear_silu_mul,
    quantize_weight,
)
from kvkeye.ops.kv_cache import append_kv, copy_blocks, qk_norm_mrope_append
from kvkeye.ops.linear import (
    pack_weight,
    packed_linear,
    packed_linear_backward,
    prepacked_linear,
    prepacked_linear_add,
    prepacked_linear_gelu,
    prepacked_linear_silu_mul,
    unpack_weight,
    values_per_word,
)
from kvkeye.ops.loss import token_logprobs, token_logprobs_backward
from kvkeye.ops.norm import (
    add_rms_norm,
    add_rms_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from kvkeye.ops.rollout import score_candidates, score_candidates_backward
from kvkeye.ops.rope import (
    mrope,
    mrope_backward,
    qk_norm_mrope,
    qk_norm_mrope_backward,
    rope_2d,
    rope_2d_backward,
)
from kvkeye.ops.sampling import sample
from kvkeye.ops.speculative import draft_tree, verify_draft
from kvkeye.ops.video_fusion import (
    blend_tiles,
    blend_tiles_backward,
    fuse_tiles,
    fuse_tiles_backward,
    normalized_tile_weights,
    spectral_blend,
    spectral_blend_backward,
    spectral_refresh,
    spectral_refresh_backward,
    tile_attention,
    tile_attention_backward,
    tile_frames,
)
from kvkeye.ops.vision import (
    interpolate_position,
    interpolate_position_backward,
    merge_patches,
    merge_patches_backward,
    pack_patches,
    resize_image,
)

__all__ = [
    "OPS",
    "Choices",
    "Implementation",
    "Op",
    "add_rms_norm",
    "add_rms_norm_backward",
    "append_kv",
    "blend_tiles",
    "blend_tiles_backward",
    "copy_blocks",
    "decoder_layer",
    "dequantize_weight",
    "draft_tree",
    "fuse_tiles",
    "fuse_tiles_backward",
    "gelu",
    "gelu_backward",
    "hsv_patches",
    "int8_linear",
    "int8_linear_add",
    "int8_linear_silu_mul",
    "interpolate_position",
    "interpolate_position_backward",
    "layer_norm",
    "layer_norm_backward",
    "merge_attention_states",
    "merge_attention_states_backward",
    "merge_patches",
    "merge_patches_backward",
    "mrope",
    "mrope_backward",
    "normalized_tile_weights",
    "op",
    "pack_patches",
    "pack_weight",
    "packed_linear",
    "packed_linear_backward",
    "paged_attention",
    "patch_products",
    "prepacked_linear",
    "prepacked_linear_add",
    "prepacked_linear_gelu",
    "prepacked_linear_silu_mul",
    "qk_norm_mrope",
    "qk_norm_mrope_append",
    "qk_norm_mrope_backward",
    "quantize_weight",
    "resize_image",
    "rms_norm",
    "rms_norm_backward",
    "rope_2d",
    "rope_2d_backward",
    "sample",
    "score_candidates",
    "score_candidates_backward",
    "settle",
    "silu_mul",
    "silu_mul_backward",
    "spectral_blend",
    "spectral_blend_backward",
    "spectral_refresh",
    "spectral_refresh_backward",
    "tile_attention",
    "tile_attention_backward",
    "tile_frames",
    "token_logprobs",
    "token_logprobs_backward",
    "unpack_weight",
    "use_backends",
    "values_per_word",
    "varlen_attention",
    "varlen_attention_backward",
    "verify_draft",
]
