// Drawing the next token on the GPU: one block of threads per row, one launch, no memory but the inputs'.
#pragma once

#include "kvkeye/common/types.h"

#include <cstdint>

namespace kvkeye {

// The same order as on the CPU (sampling.h): mask, penalties, temperature, top-k, top-p, min-p, inverse CDF.
template <class T> struct SampleCudaParams {
  const T* logits;                                  // [rows, vocabulary], rows logits_stride apart
  const float *temperature, *top_p, *min_p;         // [rows]
  const int32_t* top_k;                             // [rows], 0 is off
  const float *repetition, *presence, *frequency;   // [rows]
  const int32_t *history, *cu_history, *num_prompt; // [history_size], [rows + 1], [rows]
  const int64_t *seeds, *positions, *sample_index;  // [rows]
  const int32_t* mask;                              // [rows, ceil(vocabulary / 32)] bits, or null
  int64_t* tokens;                                  // [rows]; -1 where nothing can be drawn
  int64_t rows, logits_stride, history_size;
  int32_t vocabulary; // at most kCudaMostTokens
};

constexpr int64_t kCudaMostTokens = 1 << 20;

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. T is float or bf16. A
// token of the history outside the vocabulary traps.
template <class T> int sample(const SampleCudaParams<T>& params, void* stream);
} // namespace cuda

} // namespace kvkeye
