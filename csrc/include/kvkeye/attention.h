// Attention over packed sequences and over a paged cache.
//
// KV tiles hold 64 positions and start at multiples of 64 from the first position of a sequence; the tiles of
// 512 positions form a split with its own softmax state, and splits are folded in ascending order. A row's
// result is therefore a function of the row and of the keys that it sees: not of the rows computed beside it,
// and the same from a packed sequence and from a cache.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

static constexpr int64_t kTilePositions = 64, kSplitPositions = 512;
// Rows (token, query head of one group) that share a loaded KV tile: their sums stay in a core's own cache.
// Where the tiles of a split stay loaded instead, more rows may.
static constexpr int64_t kQueryRows = 576;
static inline int64_t query_rows() {
  return active_isa().isa == Isa::amx ? kQueryRows : 4 * kQueryRows;
}
static constexpr int64_t kBackwardRows = 64; // the same in the backward pass of tile_attention

// Elements between neighbouring tokens and neighbouring heads; the last axis is contiguous.
struct HeadStrides {
  int64_t token, head;
};

// Query tokens [begin, end) of the sequence that occupies [sequence_begin, sequence_end).
struct QuerySpan {
  int64_t begin, end, sequence_begin, sequence_end;
};

// Items: KV heads times spans.
template <class T> struct VarlenAttentionParams {
  const T* q;             // [T, num_q_heads, head_dim]
  const T *k, *v;         // [T, num_kv_heads, head_dim]
  T* o;                   // [T, num_q_heads, head_dim]
  float* lse;             // [T, num_q_heads]
  const QuerySpan* spans; // [num_spans]
  HeadStrides q_strides, k_strides, v_strides;
  int64_t num_spans, num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  bool causal;
  float* scratch; // attend_scratch() floats, one per thread
};

// Items: KV heads times sequences.
template <class T> struct VarlenAttentionBackwardParams {
  const T* grad_o;           // [T, num_q_heads, head_dim]
  const float* grad_lse;     // [T, num_q_heads]
  const T* q;                // [T, num_q_heads, head_dim]
  const T *k, *v;            // [T, num_kv_heads, head_dim]
  const T* o;                // [T, num_q_heads, head_dim]
  const float* lse;          // [T, num_q_heads]
  T* grad_q;                 // [T, num_q_heads, head_dim]
  T *grad_k, *grad_v;        // [T, num_kv_heads, head_dim]
  const int32_t* cu_seqlens; // [num_sequences + 1]
  HeadStrides q_strides, k_strides, v_strides;
  int64_t num_sequences, num_q_heads, num_kv_heads, head_dim;
  float softmax_scale;
  bool causal;
  float* scratch; // backward_scratch() floats, one per thread
};

// Query tokens [begin, end) of one sequence and the split that they attend to, or all splits if negative.
struct PagedSpan {
  int64_t begin, end, sequence, split;
};

// Items: spans times KV heads.
template <class T> struct PagedAttentionParams {
  const T* q;                                 // [T, num_q_heads, head_dim]
  const T *k_cache, *v_cache;                 // [N, num_kv_heads, block_size, head_dim]
  T* o;                                       // [T, num_q_heads, head_dim]
  float* lse;                                 // [T, num_q_heads]
  const int32_t* block_table;                 // [B, max_blocks]
  const int32_t *cu_seqlens_q, *context_lens; // [B + 1], [B]
  const int64_t* tree_mask;                   // [T] or null
  const PagedSpan* spans;                     // [num_spans]
  float *partial_o, *partial_max,
      *partial_total; // [T, num_q_heads, max_splits (, head_dim)]; spans with a split
  HeadStrides q_strides;
  struct {
    int64_t block, head, slot;
  } k_strides, v_strides;
  int64_t num_q_heads, num_kv_heads, head_dim, block_size, max_blocks, max_splits;
  float softmax_scale;
  float* scratch; // attend_scratch() floats, one per thread
};

// o and lse from the partial results of each split. Items: (token, query head).
template <class T> struct FoldSplitsParams {
  const float *partial_o, *partial_max, *partial_total; // as above
  const int32_t* num_splits;                            // [T]
  T* o;                                                 // [T, num_q_heads, head_dim]
  float* lse;                                           // [T, num_q_heads]
  int64_t num_q_heads, head_dim, max_splits;
  float* scratch; // fold_scratch() floats, one per thread
};

// Floats of working memory. Rows are padded to whole vectors of at most 16 lanes.
static inline int64_t padded_dim(int64_t head_dim) {
  return (head_dim + 15) / 16 * 16;
}
static inline int64_t attend_scratch(int64_t rows, int64_t head_dim) { // of the span with the most rows
  const int64_t lanes = rows + 64;
  return lanes * (3 * padded_dim(head_dim) + 8) + kSplitPositions * 2 * padded_dim(head_dim) +
         64 * kTilePositions + 1024;
}
static inline int64_t backward_scratch(int64_t longest, int64_t group, int64_t head_dim) {
  const int64_t rows = longest * group + 96;
  return rows * (5 * padded_dim(head_dim) + 2) +
         kTilePositions * (5 * padded_dim(head_dim) + 2 * 48 + 2 * 96) + 16 * padded_dim(head_dim) + 512;
}
static inline int64_t fold_scratch(int64_t head_dim) {
  return 2 * padded_dim(head_dim) + 64;
}

KVKEYE_KERNEL(varlen_attention, VarlenAttentionParams)
KVKEYE_KERNEL(varlen_attention_backward, VarlenAttentionBackwardParams)
KVKEYE_KERNEL(paged_attention, PagedAttentionParams)
KVKEYE_KERNEL(fold_splits, FoldSplitsParams)

} // namespace kvkeye
