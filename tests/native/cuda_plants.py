"""Overruns planted into the CUDA kernels, one per buffer: expressions and the wrong ones that a switch puts there."""

from __future__ import annotations

from tests.native.cuda_harness import Plant

ATTENTION = [
    Plant(
        "paged_attention.cu",
        "place % p.num_q_heads * p.q_head_stride",
        "(place % p.num_q_heads + 1) * p.q_head_stride",
        "q",
    ),
    Plant("paged_attention.cu", "p.k_cache", "p.k_cache + Dim", "k_cache"),
    Plant("paged_attention.cu", "p.v_cache", "p.v_cache + Dim", "v_cache"),
    Plant("paged_attention.cu", "p.o + place * Dim", "p.o + (place + 1) * Dim", "o"),
    Plant("paged_attention.cu", "p.lse[place]", "p.lse[place + 1]", "lse"),
    Plant("paged_attention.cu", "position >= tile.end", "position >= tile.end + kCudaTile", "block_table"),
    Plant(
        "attention_rows.h", "p.cu_seqlens_q[found.sequence + 1]", "p.cu_seqlens_q[found.sequence + 2]", "cu_seqlens_q"
    ),
    Plant("attention_rows.h", "p.context_lens[found.sequence]", "p.context_lens[found.sequence + 1]", "context_lens"),
    Plant(
        "attention_rows.h",
        "p.tree_mask[tile.first_token + token]",
        "p.tree_mask[tile.first_token + token + 1]",
        "tree_mask",
    ),
    Plant("paged_attention.cu", "p.partial_o + place * Dim", "p.partial_o + (place + 1) * Dim", "partial_o"),
    Plant("paged_attention.cu", "p.partial_state + 2 * place", "p.partial_state + 2 * place + 2", "partial_state"),
    Plant("paged_attention.cu", "(int64_t)blockIdx.x * gridDim.y", "(int64_t)(blockIdx.x + 1) * gridDim.y", "arrivals"),
    Plant("attention_warp.h", "count * L::kPadded", "(count + 1) * L::kPadded", "keys in shared memory"),
]

SAMPLING = [
    Plant("sampling_row.h", "place.row * p.logits_stride + i", "place.row * p.logits_stride + i + 1", "logits"),
    Plant("sampling_row.h", "(int64_t)i / 32", "(int64_t)i / 32 + 1", "mask"),
    Plant("sampling_row.h", "p.history[i]", "p.history[i + 1]", "history"),
    Plant("sampling_row.h", "p.num_prompt[place.request]", "p.num_prompt[place.request + 1]", "num_prompt"),
    Plant("sampling_row.h", "p.temperature[request]", "p.temperature[request + 1]", "temperature"),
    Plant("sampling_row.h", "counts.seen[i % kSliceTokens]", "counts.seen[i]", "counts"),
    Plant("sampling_draw.h", "p.top_p[request] < 1.0f", "p.top_p[request + 1] < 1.0f", "top_p"),
    Plant("sampling_draw.h", "row.p.seeds[request]", "row.p.seeds[request + 1]", "seeds"),
    Plant("sampling.cu", "p.tokens[at]", "p.tokens[at + 1]", "tokens"),
    Plant("sampling_draw.h", "bucket.count_before + bucket.count", "0 * bucket.count", "candidates"),
]

SPECULATIVE = [
    Plant("speculative.cu", "p.tree_parents[tree.first + i]", "p.tree_parents[p.sample.rows + i]", "tree_parents"),
    Plant("speculative.cu", "p.draft_tokens[tree.first + i]", "p.draft_tokens[tree.first + i + 1]", "draft_tokens"),
    Plant("speculative.cu", "p.cu_rows[tree + 1]", "p.cu_rows[tree + 2]", "cu_rows"),
    Plant(
        "speculative.cu", "(int64_t)at * p.sample.vocabulary", "(int64_t)(at + 1) * p.sample.vocabulary", "draft_probs"
    ),
    Plant("speculative.cu", "p.sample.tokens[at]", "p.sample.tokens[at + 1]", "tokens of the draws"),
    Plant(
        "speculative.cu", "p.rows[tree.first + lane + 32 * half]", "p.rows[tree.first + lane + 32 * half + 1]", "rows"
    ),
    Plant("speculative.cu", "p.counts[request]", "p.counts[request + 1]", "counts"),
    Plant("speculative.cu", "branch.path[--depth]", "branch.path[--depth - 1]", "path"),
    Plant("speculative.cu", "offers.tokens[count++]", "offers.tokens[count++ - 1]", "offers"),
]

ROPE = [
    Plant("rope.cu", "p.qkv + token * p.stride", "p.qkv + (token + 1) * p.stride", "qkv"),
    Plant("rope.cu", "weight + kEach * lane", "weight + kEach * (lane + 1)", "weights"),
    Plant("rope.cu", "(token * p.num_q_heads + head) * Dim", "(token * p.num_q_heads + head + 1) * Dim", "q"),
    Plant(
        "rope.cu",
        "first_row + (int64_t)kv_head * p.block_size",
        "first_row + (kv_head + 1) * (int64_t)p.block_size",
        "cache",
    ),
    Plant("rope.cu", "p.positions[axis * p.tokens + token]", "p.positions[axis * p.tokens + token + 1]", "positions"),
    Plant("rope.cu", "p.slot_mapping[token]", "p.slot_mapping[token + 1]", "slot_mapping"),
    Plant("rope.cu", "angles.sin[column + i]", "angles.sin[column + i + Dim / 2]", "angles"),
]

VISION = [
    Plant("vision.cu", "min(row + i, last)", "min(row + i, last + kTogether)", "rows after the last"),
    Plant("vision.cu", "i < patches * 3 * kArea / 4", "i < patches * 3 * kArea / 4 + 1", "patches after the last"),
    Plant("vision.cu", "3 * (int64_t)across.first", "3 * (int64_t)(across.first + 1)", "the next column"),
]
KV_CACHE = [
    Plant("kv_cache.cu", "token * p.token_stride[side]", "(token + 1) * p.token_stride[side]", "source"),
    Plant("kv_cache.cu", "first_row + head * p.block_size", "first_row + (head + 1) * p.block_size", "cache"),
    Plant("kv_cache.cu", "p.slot_mapping[token]", "p.slot_mapping[token + 1]", "slot_mapping"),
    Plant("kv_cache.cu", "i < bytes / (int64_t)sizeof(Word)", "i < bytes / (int64_t)sizeof(Word) + 1", "blocks"),
    Plant(
        "kv_cache.cu",
        "p.block_pairs[2 * (int64_t)blockIdx.x]",
        "p.block_pairs[2 * (int64_t)blockIdx.x + 2]",
        "block_pairs",
    ),
]
VIDEO_FUSION = [
    Plant("video_fusion.cu", "load<T, N>(p.outputs + at)", "load<T, N>(p.outputs + at + 1)", "outputs"),
    Plant("video_fusion.cu", "p.latent + at", "p.latent + at + 1", "latent"),
    Plant("video_fusion.cu", "tile < (int)p.tiles", "tile <= (int)p.tiles", "starts"),
    Plant("video_fusion.cu", "p.weights[tile * p.length + place]", "p.weights[tile * p.length + place + 1]", "weights"),
]
FP8 = [
    Plant("paged_attention.cu", "p.k_scales[place]", "p.k_scales[place + 1]", "k_scales"),
    Plant("paged_attention.cu", "p.v_scales[place]", "p.v_scales[place + 1]", "v_scales"),
    Plant("rope.cu", "(value ? p.v_scales : p.k_scales)[row]", "(value ? p.v_scales : p.k_scales)[row + 4]", "scales"),
    Plant(
        "kv_cache.cu",
        "(int64_t)blockIdx.x * p.token_stride[side]",
        "(int64_t)(blockIdx.x + 1) * p.token_stride[side]",
        "rows to quantise",
    ),
    Plant("kv_cache.cu", "p.scales[side][row]", "p.scales[side][row + 1]", "scales"),
    Plant("kv_cache.cu", "row * p.row_bytes + i", "(row + 1) * p.row_bytes + i", "levels"),
]

ALL = [*ATTENTION, *SAMPLING, *SPECULATIVE, *ROPE, *VISION, *KV_CACHE, *VIDEO_FUSION, *FP8]
