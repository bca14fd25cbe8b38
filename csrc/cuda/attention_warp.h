// One warp's work: 16 rows against every fourth piece of 16 keys.
//
// A KV tile of 64 positions is cut into four slices, one per warp: its scores become weights in registers and
// go straight into the second product. Warps meet only when a split is done.
#pragma once

#include "attention_fold.h"

namespace kvkeye::cuda {

constexpr int kSlices = 4, kSliceKeys = kCudaTile / kSlices;

template <int Dim> struct Layout {
  static constexpr int kSteps = (Dim + 15) / 16; // of 16 dimensions
  static constexpr int kColumns = 2 * kSteps;    // output fragments of 8 dimensions
};

// Rows of head_dim values in pieces of 16 bytes. An odd pitch puts eight rows into different banks.
template <class T, int Dim> struct Stored {
  static constexpr int kEach = 16 / (int)sizeof(T);                // values of a piece
  static constexpr int kPieces = Dim / kEach;                      // in memory
  static constexpr int kPadded = 16 * Layout<Dim>::kSteps / kEach; // zeros after the last dimension
  static constexpr int kPitch = kPadded | 1;                       // in shared memory
  using Rows = uint4[kCudaTile][kPitch];
};

__device__ __forceinline__ int lane_of() {
  return (int)threadIdx.x % 32;
}

// What a warp holds of its 16 rows: lane l of rows l / 4 and l / 4 + 8.
template <int Dim> struct WarpState {
  float o[Layout<Dim>::kColumns][4];
  RowState rows[2];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < Layout<Dim>::kColumns; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        o[i][j] = 0.0f;
    rows[0] = rows[1] = {kMinusInfinity, 0.0f};
  }
};

// Queries as the left side of the first product. Rows that are not there are zero.
template <int Dim>
__device__ void load_queries(uint32_t (&q)[Layout<Dim>::kSteps][4], const bf16* const (&rows)[2]) {
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 16 * step + 8 * (i / 2) + 2 * (lane_of() % 4);
      const bf16* row = rows[i % 2];
      q[step][i] = row != nullptr && column < Dim ? *reinterpret_cast<const uint32_t*>(row + column) : 0;
    }
  }
}

// Starts the copies of `count` rows of one slice from row `first` on. Lane i brings the place of the slice's
// row i in the cache, negative where there is none.
template <class T, int Dim>
__device__ void load_slice(typename Stored<T, Dim>::Rows& tile, const T* cache, int place, int slice,
                           int first, int count) {
  using L = Stored<T, Dim>;
#pragma unroll
  for (int i = 0; i < kSliceKeys * L::kPadded / 32; ++i) {
    const int item = lane_of() + 32 * i, row = first + item / L::kPadded, piece = item % L::kPadded;
    const int found = __shfl_sync(0xffffffffu, place, row);
    if (item >= count * L::kPadded)
      continue;
    const bool valid = found >= 0 && piece < L::kPieces;
    const T* source = valid ? cache + (int64_t)found * Dim + L::kEach * piece : cache;
    copy_async(&tile[kSliceKeys * slice + row][piece], source, valid);
  }
}

// scores = q k, of 16 rows and the slice's 16 keys.
template <int Dim>
__device__ void multiply_keys(float (&scores)[2][4], const uint32_t (&q)[Layout<Dim>::kSteps][4],
                              const typename Stored<bf16, Dim>::Rows& keys, int slice) {
  const int lane = lane_of(), row = kSliceKeys * slice + lane % 8 + 8 * (lane / 16);
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; ++step) {
    uint32_t k[4];
    load_matrices(k, &keys[row][2 * step + lane / 8 % 2]);
    multiply_add(scores[0], q[step], k[0], k[1]);
    multiply_add(scores[1], q[step], k[2], k[3]);
  }
}

// o += weights v.
template <int Dim>
__device__ void multiply_values(float (&o)[Layout<Dim>::kColumns][4], const uint32_t (&weights)[4],
                                const typename Stored<bf16, Dim>::Rows& values, int slice) {
  const int lane = lane_of(), row = kSliceKeys * slice + lane % 16;
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; ++step) {
    uint32_t v[4];
    load_matrices_transposed(v, &values[row][2 * step + lane / 16]);
    multiply_add(o[2 * step], weights, v[0], v[1]);
    multiply_add(o[2 * step + 1], weights, v[2], v[3]);
  }
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// Scores to weights, in place; the row's older sums shrink as its peak grows. The total stays a lane's own.
template <int Dim> __device__ void weigh(WarpState<Dim>& state, float (&scores)[2][4]) {
  float decay[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    RowState& row = state.rows[h];
    float* first = &scores[0][2 * h];
    float* second = &scores[1][2 * h];
    const float most = fmaxf(fmaxf(first[0], first[1]), fmaxf(second[0], second[1]));
    const float peak = fmaxf(row.peak, quad_max(most)), base = base_of(peak);
    decay[h] = exp2_fast(row.peak - base);
    first[0] = exp2_fast(first[0] - base);
    first[1] = exp2_fast(first[1] - base);
    second[0] = exp2_fast(second[0] - base);
    second[1] = exp2_fast(second[1] - base);
    row.total = __fmaf_rn(row.total, decay[h], (first[0] + first[1]) + (second[0] + second[1]));
    row.peak = peak;
  }
#pragma unroll
  for (int i = 0; i < Layout<Dim>::kColumns; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      state.o[i][j] = __fmul_rn(state.o[i][j], decay[j / 2]);
}

// Weights as the left side of the second product.
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[4], const float (&weights)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    packed[i] = pack_bf16(weights[i / 2][2 * (i % 2)], weights[i / 2][2 * (i % 2) + 1]);
}

} // namespace kvkeye::cuda
