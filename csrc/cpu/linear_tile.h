// The inner product of tiles: rows of inputs times a panel of outputs, one chunk of inputs at a time.
//
// Lanes are outputs: an input is broadcast and meets vectors of weights, so that a sum stays in its lane from
// the first product to the last.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/linear.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVectors = 4; // 24 sums, 4 weights and 1 input in 32 registers
#else
constexpr int kTileRows = 4, kTileVectors = 2; // 8 sums, 2 weights and 1 input in 16 registers
#endif

KVKEYE_INLINE Vf upper(Vf pairs) {
  return (Vf)((Vu)pairs & 0xffff0000u);
}
KVKEYE_INLINE Vf lower(Vf pairs) {
  return (Vf)((Vu)pairs << 16);
}

// How a word of 4 bytes of a weight is multiplied: in `steps`, each with an input of its own.

// One fp32.
struct Single {
  static constexpr int steps = 1;
  KVKEYE_INLINE Vf weight(Vf word, int) { return word; }
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) { return fma(x, w, total); }
};

// Two bf16, widened here: the upper product enters the sum first, as vdpbf16ps does it.
struct Widened {
  static constexpr int steps = 2;
  KVKEYE_INLINE Vf weight(Vf word, int step) { return step == 0 ? upper(word) : lower(word); }
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) { return fma(x, w, total); }
};

#if defined(__AVX512BF16__)
// Two bf16 in one instruction, which is two fused multiply-adds. Some CPUs need more time for it than for
// those two.
struct Paired {
  static constexpr int steps = 1;
  KVKEYE_INLINE Vf weight(Vf word, int) { return word; }
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) {
    return (Vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)w);
  }
};
#endif

// total[m][o] (+)= the sum over the words of a chunk of x[m] w[o]. Inputs of a row lie together, rows
// kInputChunk apart. With `next`, weights there are asked for at the pace at which w is read.
template <class Product, int M, int N, bool Streams>
void multiply(const float* x, const float* w, int words, float* total, bool first, const float* next) {
  for (int o = 0; o < kPanel; o += N * kLanes) {
    Vf sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[m][n] = Vf{};
    for (int k = 0; k < words; ++k) {
      if constexpr (Streams)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          __builtin_prefetch(next + k * kPanel + o + n * kLanes);
#pragma GCC unroll 2
      for (int step = 0; step < Product::steps; ++step) {
        Vf weight[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          weight[n] = Product::weight(load(w + k * kPanel + o + n * kLanes), step);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vf input = splat(x[m * kInputChunk + k * Product::steps + step]);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n)
            sum[m][n] = Product::multiply(input, weight[n], sum[m][n]);
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* at = total + m * kPanel + o + n * kLanes;
        store(at, first ? sum[m][n] : load(at) + sum[m][n]);
      }
  }
}

// The tile of `rows` rows, at most Rows of them.
template <class Product, bool Streams, int Rows>
KVKEYE_INLINE void multiply_tile(const float* x, const float* w, int words, int rows, float* total,
                                 bool first, const float* next) {
  if constexpr (Rows > 0) {
    constexpr int vectors = Rows <= kTileRows ? kTileVectors : kTileVectors / 2;
    if (rows == Rows)
      return multiply<Product, Rows, vectors, Streams>(x, w, words, total, first, next);
    multiply_tile<Product, Streams, Rows - 1>(x, w, words, rows, total, first, next);
  }
}

// Memory that will be needed next: `rows` pieces of `lines` cache lines, `stride` bytes apart.
struct Upcoming {
  const char* first;
  int64_t stride;
  int rows, lines;

  // Asks for the part-th of `parts` parts.
  KVKEYE_INLINE void fetch(const Upcoming& next, int part, int parts) {
    const int begin = next.rows * part / parts, end = next.rows * (part + 1) / parts;
    for (int row = begin; row < end; ++row)
      for (int line = 0; line < next.lines; ++line)
        __builtin_prefetch(next.first + row * next.stride + line * 64, 0, 2);
  }
};

// Many rows: memory has the time of all tiles to bring what comes next.
template <class Product>
void multiply_rows(const float* x, const float* w, int words, int rows, float* total, bool first,
                   const Upcoming& weights, const Upcoming& inputs) {
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int tile = 0; tile < tiles; ++tile) {
    const int row = tile * kTileRows;
    Upcoming::fetch(weights, tile, tiles);
    Upcoming::fetch(inputs, tile, tiles);
    multiply_tile<Product, false, kTileRows>(x + row * kInputChunk, w, words,
                                             rows - row < kTileRows ? rows - row : kTileRows,
                                             total + row * kPanel, first, nullptr);
  }
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
