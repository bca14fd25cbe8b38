// Rotary embeddings, split-half: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. Items are tokens.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// Largest head size of the kernels that keep one head in registers and on the stack.
inline constexpr int64_t kMaxHeadDim = 512;

// Heads turned by a table of angles.
template <class T> struct RotateParams {
  const T* x;       // [tokens, heads, dim], strided
  const float* cos; // [tokens, dim / 2]
  const float* sin; // [tokens, dim / 2]
  T* y;             // [tokens, heads, dim]
  int64_t heads, dim, token_stride, head_stride;
  bool inverse; // turn back: the gradient
};

// Angles of sectioned positions: frequency i turns by axis 0 for i < sections[0], then by axis 1, then by
// axis 2.
struct SectionedAngles {
  const int64_t* positions; // [3, tokens]
  const float* frequency;   // [dim / 2]
  int64_t tokens;
  int64_t sections[3]; // sum dim / 2
};

template <class T> struct MropeParams {
  RotateParams<T> rotate; // cos and sin unused
  SectionedAngles angles;
};

// Per head: RMS norm, rounded as the separate ops would, then the sectioned rotation.
template <class T> struct QkNormMropeParams {
  const T* qkv;      // [tokens, (num_q_heads + 2 num_kv_heads) dim], rows stride apart
  const T* q_weight; // [dim]
  const T* k_weight; // [dim]
  T* q;              // [tokens, num_q_heads, dim]
  T* k;              // [tokens, num_kv_heads, dim], or null when the keys go to the cache
  SectionedAngles angles;
  int64_t num_q_heads, num_kv_heads, dim, stride;
  float eps;

  T* k_cache;                  // [blocks, num_kv_heads, block_size, dim], or null
  T* v_cache;                  // [blocks, num_kv_heads, block_size, dim]
  const int64_t* slot_mapping; // [tokens], negative: do not write
  int64_t block_size;
};

template <class T> struct QkNormMropeBackwardParams {
  const T* grad_q;   // [tokens, num_q_heads, dim]
  const T* grad_k;   // [tokens, num_kv_heads, dim]
  const T* qkv;      // [tokens, (num_q_heads + 2 num_kv_heads) dim], rows stride apart
  const T* q_weight; // [dim]
  const T* k_weight; // [dim]
  T* grad_qkv;       // [tokens, (num_q_heads + 2 num_kv_heads) dim]
  T* grad_weights;   // [2, dim]: of q_weight, of k_weight
  float* partial;    // [tokens, 2, dim]: each token's share of the weight gradients
  SectionedAngles angles;
  int64_t num_q_heads, num_kv_heads, dim, stride;
  float eps;
};

KVKEYE_KERNEL(rotate, RotateParams)
KVKEYE_KERNEL(mrope, MropeParams)
KVKEYE_KERNEL(qk_norm_mrope, QkNormMropeParams)
KVKEYE_KERNEL(qk_norm_mrope_backward, QkNormMropeBackwardParams)
KVKEYE_KERNEL(qk_norm_mrope_backward_columns, QkNormMropeBackwardParams)

} // namespace kvkeye
