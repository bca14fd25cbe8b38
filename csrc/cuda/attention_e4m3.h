// What attention_warp.h does, over e4m3 rows with scales.
//
// Values become bf16 on their way from shared memory to a product: two by two, the even and the odd of four
// neighbours. So within 16 dimensions the first product takes them in the order 0 2, 4 6, 8 10, 12 14, 1 3,
// ..., queries as keys; the second one has outputs 0, 2, 4, ... in its first fragment and 1, 3, 5, ... in the
// other, until a split is done.
#pragma once

#include "attention_warp.h"
#include "e4m3.h"

namespace kvkeye::cuda {

// Of one key: what its score and what its weight is multiplied with.
template <class T> struct KeyScales {};
template <> struct KeyScales<e4m3> {
  float score, weight;
};

template <int Dim>
__device__ void load_mixed_queries(uint32_t (&q)[Layout<Dim>::kSteps][4], const bf16* const (&rows)[2]) {
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; ++step) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto* row = reinterpret_cast<const uint32_t*>(rows[h]);
      const int word = 8 * step + 2 * (lane_of() % 4);
      const uint32_t low = row != nullptr ? row[word] : 0, high = row != nullptr ? row[word + 1] : 0;
      q[step][h] = (low & 0xffffu) | high << 16;
      q[step][2 + h] = low >> 16 | (high & 0xffff0000u);
    }
  }
}

// scores = q levels, of 16 rows and the slice's 16 keys.
template <int Dim>
__device__ void multiply_levels(float (&scores)[2][4], const uint32_t (&q)[Layout<Dim>::kSteps][4],
                                const typename Stored<e4m3, Dim>::Rows& keys, int slice) {
  const int lane = lane_of(), row = kSliceKeys * slice + lane % 8 + 8 * (lane / 16);
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; step += 2) {
    uint32_t k[4]; // eight keys of this step and of the next, then the other eight
    load_matrices(k, &keys[row][step + lane / 8 % 2]);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      multiply_add(scores[0], q[step + next], even_of(k[next]), odd_of(k[next]));
      multiply_add(scores[1], q[step + next], even_of(k[2 + next]), odd_of(k[2 + next]));
    }
  }
}

// o += weights levels.
template <int Dim>
__device__ void add_levels(float (&o)[Layout<Dim>::kColumns][4], const uint32_t (&weights)[4],
                           const typename Stored<e4m3, Dim>::Rows& values, int slice) {
  const int lane = lane_of(), row = kSliceKeys * slice + lane % 16;
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; step += 2) {
    uint32_t v[4]; // keys 0 to 7 and 8 to 15 of this step, then of the next
    load_matrices_transposed(v, &values[row][step + lane / 16]);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
      const uint32_t first = v[2 * next], second = v[2 * next + 1];
      multiply_add(o[2 * (step + next)], weights, even_of(first), even_of(second));
      multiply_add(o[2 * (step + next) + 1], weights, odd_of(first), odd_of(second));
    }
  }
}

// Each column of scores or weights times the factor of its key; lane i brings that of the slice's key i.
__device__ __forceinline__ void multiply_columns(float (&columns)[2][4], float factor) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int key = 8 * (i / 2) + 2 * (lane_of() % 4) + i % 2;
    const float own = __shfl_sync(0xffffffffu, factor, key);
    columns[i / 2][i % 2] = __fmul_rn(columns[i / 2][i % 2], own);
    columns[i / 2][i % 2 + 2] = __fmul_rn(columns[i / 2][i % 2 + 2], own);
  }
}

// The fragments of a warp, dimensions back in their order: lane l writes what lanes of its row will hold.
template <int Dim>
__device__ void store_in_order(float4 (&target)[Layout<Dim>::kColumns][32],
                               const float (&o)[Layout<Dim>::kColumns][4]) {
  const int column = lane_of() % 4, first = lane_of() - column + 2 * (column % 2);
#pragma unroll
  for (int step = 0; step < Layout<Dim>::kSteps; ++step) {
    const float (&even)[4] = o[2 * step], (&odd)[4] = o[2 * step + 1];
    target[2 * step + column / 2][first] = make_float4(even[0], odd[0], even[2], odd[2]);
    target[2 * step + column / 2][first + 1] = make_float4(even[1], odd[1], even[3], odd[3]);
  }
}

} // namespace kvkeye::cuda
