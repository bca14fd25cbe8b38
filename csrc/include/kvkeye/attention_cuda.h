// Paged attention on the GPU: what a launch needs, and how a call is cut into blocks of threads.
#pragma once

#include "kvkeye/common/e4m3.h"

#include <cstdint>

namespace kvkeye {

constexpr int kCudaTile = 64, kCudaSplit = 512; // positions; both start at multiples of themselves

// T is what the caches hold: bf16 or e4m3. Queries and outputs are bf16.
template <class T> struct PagedCudaParams : CacheScales<T, const float> {
  const bf16* q;                              // [T, num_q_heads, head_dim], aligned to 4 bytes
  const T *k_cache, *v_cache;                 // [num_blocks, num_kv_heads, block_size, head_dim], to 16 bytes
  bf16* o;                                    // [T, num_q_heads, head_dim]
  float* lse;                                 // [T, num_q_heads]
  const int32_t* block_table;                 // [num_sequences, max_blocks]
  const int32_t *cu_seqlens_q, *context_lens; // [num_sequences + 1], [num_sequences]
  const int64_t* tree_mask;                   // [T] or null
  float* partial_o;                           // [T, num_q_heads, splits, head_dim]
  float* partial_state;                       // [T, num_q_heads, splits, 2]: peak, total
  int32_t* arrivals;                          // [row_tiles, num_kv_heads], zero before and after
  int64_t q_token_stride, q_head_stride;      // in elements, even
  int32_t num_tokens, num_sequences, num_q_heads, num_kv_heads;
  int32_t num_blocks, block_size, max_blocks;
  float softmax_scale;
};

// Follows from shapes alone, so that a captured graph fits every batch of its shape.
struct PagedCudaPlan {
  int row_groups; // of 16 rows (token, query head of one KV head) in a block of threads: 1 or 2
  int row_tiles;  // blocks of threads per KV head and split
  int splits;     // side by side, each with its partial results; 1: a block walks them all
};

// Splits go side by side while their partial results stay below this (128 MiB).
constexpr int64_t kCudaPartialFloats = 32 << 20;

inline PagedCudaPlan paged_cuda_plan(int64_t tokens, int64_t sequences, int64_t q_heads, int64_t kv_heads,
                                     int64_t head_dim, int64_t max_context) {
  const int64_t pairs = tokens * (q_heads / kv_heads);
  const int groups = pairs <= 16 * sequences ? 1 : 2;
  const int64_t splits = (max_context + kCudaSplit - 1) / kCudaSplit;
  const bool side_by_side = splits > 1 && tokens * q_heads * splits * (head_dim + 2) <= kCudaPartialFloats;
  return {groups, (int)(pairs / (16 * groups) + sequences), side_by_side ? (int)splits : 1};
}

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. head_dim is 64, 72, 80 or
// 128, over e4m3 64 or 128. A block, length or bound out of range traps: it is not known on the host without
// a synchronisation.
template <class T>
int paged_attention(const PagedCudaParams<T>& params, const PagedCudaPlan& plan, int64_t head_dim,
                    void* stream);
} // namespace cuda

} // namespace kvkeye
