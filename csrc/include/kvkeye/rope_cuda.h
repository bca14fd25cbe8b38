// The fused norm, rotation and cache write on the GPU.
#pragma once

#include "kvkeye/rope.h"

namespace kvkeye {

// QkNormMropeParams with a cache, its table of frequencies by value: no copy to the device, no wait.
template <class T> struct QkNormMropeAppendCudaParams {
  const T* qkv;                  // [tokens, (num_q_heads + 2 num_kv_heads) dim], rows stride apart; 16 bytes
  const T *q_weight, *k_weight;  // [dim], 16 bytes
  T* q;                          // [tokens, num_q_heads, dim]
  T *k_cache, *v_cache;          // [blocks, num_kv_heads, block_size, dim], 16 bytes
  const int64_t* positions;      // [3, tokens]
  const int64_t* slot_mapping;   // [tokens], negative: do not write
  int64_t tokens, stride, slots; // slots = blocks * block_size: every slot is below it
  int32_t num_q_heads, num_kv_heads, block_size;
  int32_t section_ends[2]; // frequencies before the first turn by axis 0, before the second by axis 1
  float eps;
  float frequency[128]; // [dim / 2]
};

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. T is float or bf16, dim is
// 64, 128 or 256. A slot out of range traps.
template <class T>
int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<T>& params, int64_t dim, void* stream);
} // namespace cuda

} // namespace kvkeye
