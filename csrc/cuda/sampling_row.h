// A row of logits: its values after mask and penalties, their probabilities and their keys.
//
// The vocabulary is walked in slices, each warp in its own piece of each. Where there are penalties, the
// history's tokens of the slice are counted first, in shared memory.
#pragma once

#include "kvkeye/sampling_cuda.h"

#include "sampling_block.h"

#include <math.h>

namespace kvkeye::cuda {

constexpr int kPiece = 256, kSliceTokens = kBlockWarps * kPiece;
constexpr int kPieces = (int)kCudaMostTokens / kPiece;

// Odd numbers are of tokens in the prompt; half the number is how often the output has them.
struct Counts {
  uint32_t seen[kSliceTokens];
};

__device__ __forceinline__ double value_of(float x) {
  return x;
}
__device__ __forceinline__ double value_of(bf16 x) {
  return __uint_as_float((uint32_t)x.bits << 16);
}

// A row of logits, whose settings it has, and the tokens (in shared memory) between the history and the draw.
struct Place {
  int64_t row, request;
  const int* path;
  int depth; // less than kBlockThreads
};

template <class T> struct Row {
  const SampleCudaParams<T>& p;
  Counts& counts;
  Place place;
  double inverse_temperature, peak, offset; // offset = peak / temperature
  float key_scale;
  bool penalised;

  __device__ Row(const SampleCudaParams<T>& params, Counts& memory, const Place& where)
      : p(params), counts(memory), place(where), peak(0.0), offset(0.0) {
    const int64_t request = place.request;
    const double temperature = p.temperature[request];
    inverse_temperature = 1.0 / temperature;
    key_scale = (float)(inverse_temperature * (64.0 * 1.4426950408889634)); // 64 per power of two
    penalised =
        p.cu_history[request + 1] - p.cu_history[request] + place.depth > 0 &&
        (p.repetition[request] != 1.0f || p.presence[request] != 0.0f || p.frequency[request] != 0.0f);
  }

  __device__ void set_peak(double value) {
    peak = value;
    offset = __dmul_rn(peak, inverse_temperature);
  }

  __device__ void count_token(int slice, int id, bool in_prompt) const {
    if (id < 0 || id >= p.vocabulary)
      __trap();
    if (id < slice || id >= slice + kSliceTokens)
      return;
    if (in_prompt)
      atomicMax(&counts.seen[id - slice], 1u);
    else
      atomicAdd(&counts.seen[id - slice], 2u);
  }

  // Counts the tokens of history and path in the slice.
  __device__ void count(int slice) const {
    __syncthreads(); // the last slice's counts are read
    for (int i = (int)threadIdx.x; i < kSliceTokens; i += kBlockThreads)
      counts.seen[i] = 0;
    __syncthreads();
    const int first = p.cu_history[place.request], end = p.cu_history[place.request + 1];
    const int prompt = p.num_prompt[place.request];
    if (first < 0 || end > p.history_size)
      __trap();
    for (int i = first + (int)threadIdx.x; i < end; i += kBlockThreads)
      count_token(slice, p.history[i], i - first < prompt);
    if ((int)threadIdx.x < place.depth)
      count_token(slice, place.path[threadIdx.x], end - first + (int)threadIdx.x < prompt);
    __syncthreads();
  }

  // The value of a token of the slice that was counted last.
  __device__ double value(int i) const {
    if (p.mask != nullptr) {
      const uint32_t word = (uint32_t)p.mask[place.row * ((p.vocabulary + 31) / 32) + (int64_t)i / 32];
      if ((word >> (i % 32) & 1u) == 0)
        return -INFINITY;
    }
    const double value = value_of(p.logits[place.row * p.logits_stride + i]);
    const uint32_t seen = penalised ? counts.seen[i % kSliceTokens] : 0;
    return seen == 0 ? value : with_penalties(value, (int)(seen >> 1));
  }

  __device__ double with_penalties(double value, int count) const {
    const double repetition = p.repetition[place.request], presence = p.presence[place.request],
                 frequency = p.frequency[place.request];
    if (repetition != 1.0)
      value = value > 0.0 ? value / repetition : value * repetition;
    return count == 0 ? value : value - __dmul_rn(frequency, (double)count) - presence;
  }

  // Relative to the peak's. One function of the value wherever it is asked.
  __device__ double probability(double value) const {
    const double found = exp(__dmul_rn(value, inverse_temperature) - offset);
    return found == found ? found : 0.0; // -inf over an infinite temperature
  }

  // 24 bits, from 0 at the peak up as probability falls: 4096 steps in each 64th of a power of two. What lies
  // below 2^-64 shares the last 64th.
  __device__ int key(double value) const {
    const float distance = __fmul_rn((float)(peak - value), key_scale);
    return (int)(fmaxf(fminf(distance, 4095.99976f), 0.0f) * 4096.0f); // a NaN is the last one
  }

  // body(token, value, piece) over the vocabulary, each warp over whole pieces; after(piece) when one is
  // done. All threads of the block come along.
  template <class Body, class After> __device__ void for_pieces(Body body, After after) const {
    for (int slice = 0; slice < p.vocabulary; slice += kSliceTokens) {
      if (penalised)
        count(slice);
      const int first = slice + warp_index() * kPiece;
      if (first >= p.vocabulary)
        continue;
      for (int i = first + lane_index(); i < min(first + kPiece, p.vocabulary); i += 32)
        body(i, value(i));
      after(first / kPiece);
    }
  }

  template <class Body> __device__ void for_tokens(Body body) const {
    for_pieces(body, [](int) {});
  }
};

} // namespace kvkeye::cuda
