// The fused norm, rotation and cache write on the GPU.
#pragma once

#include "kvkeye/common/e4m3.h"
#include "kvkeye/rope.h"

namespace kvkeye {

// QkNormMropeParams with a cache of C, its table of frequencies by value: no copy to the device, no wait.
template <class T, class C = T> struct QkNormMropeAppendCudaParams : CacheScales<C, float> {
  const T* qkv;                  // [tokens, (num_q_heads + 2 num_kv_heads) dim], rows stride apart; 16 bytes
  const T *q_weight, *k_weight;  // [dim], 16 bytes
  T* q;                          // [tokens, num_q_heads, dim]
  C *k_cache, *v_cache;          // [blocks, num_kv_heads, block_size, dim], 16 bytes
  const int64_t* positions;      // [3, tokens]
  const int64_t* slot_mapping;   // [tokens], negative: do not write
  int64_t tokens, stride, slots; // slots = blocks * block_size: every slot is below it
  int32_t num_q_heads, num_kv_heads, block_size;
  int32_t section_ends[2]; // frequencies before the first turn by axis 0, before the second by axis 1
  float eps;
  float frequency[128]; // [dim / 2]
};

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. T and C are both float or
// both bf16 and dim is 64, 128 or 256, or C is e4m3, T bf16 and dim 64 or 128. A slot out of range traps.
template <class T, class C>
int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<T, C>& params, int64_t dim, void* stream);
} // namespace cuda

} // namespace kvkeye
