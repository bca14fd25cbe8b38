// What the attention kernels multiply: tiles of keys and values in fp32, and one small matrix product.
//
// Each element of a product is one chain of multiply-adds over its depth, whatever the block it is computed
// in, and whichever of the two factors lies in the lanes.
#pragma once

#include "kvkeye/attention.h"
#include "kvkeye/common/simd.h"

// Functions of their own: inlined together, inner loops run out of address registers.
#define KVKEYE_APART __attribute__((noinline))

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kTile = (int)kTilePositions;

KVKEYE_INLINE int64_t round_up(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// Hands out aligned pieces of the scratch memory.
struct Arena {
  float* next;
  explicit Arena(float* memory) : next((float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63)) {}
  float* take(int64_t floats) {
    float* piece = next;
    next += (floats + 15) / 16 * 16;
    return piece;
  }
};

// The matrix product.

// An element (i, k) is at data[i * row + k * column].
struct Factor {
  const float* data;
  int64_t row, column;
};

template <int M, int N, bool kAdd>
KVKEYE_INLINE void multiply_block(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                                  int64_t depth) {
  Vf total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      total[m][n] = kAdd ? load(c + m * c_row + n * kLanes) : Vf{};
  for (int64_t k = 0; k < depth; ++k) {
    Vf column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      column[n] = load(b + k * b_row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf row = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        total[m][n] = fma(row, column[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(c + m * c_row + n * kLanes, total[m][n]);
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 6; // times 4 vectors: 24 sums, 4 columns and 1 row in 32 registers
#else
constexpr int kBlockRows = 2; // times 4 vectors: 8 sums, 4 columns and 1 row in 16 registers
#endif

template <int N, bool kAdd>
void multiply_strip(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                    int64_t depth) {
  int64_t i = 0;
  const auto advance = [&](int count) {
    i += count;
    a.data += count * a.row;
    c += count * c_row;
  };
  for (; i + kBlockRows <= rows; advance(kBlockRows))
    multiply_block<kBlockRows, N, kAdd>(a, b, b_row, c, c_row, depth);
  if (kBlockRows > 4 && i + 4 <= rows) {
    multiply_block<4, N, kAdd>(a, b, b_row, c, c_row, depth);
    advance(4);
  }
  if (kBlockRows > 2 && i + 2 <= rows) {
    multiply_block<2, N, kAdd>(a, b, b_row, c, c_row, depth);
    advance(2);
  }
  if (i < rows)
    multiply_block<1, N, kAdd>(a, b, b_row, c, c_row, depth);
}

// c[i, n] (+)= sum_k a[i, k] b[k, n] for i < rows and n < columns, a multiple of the vector.
template <bool kAdd>
void multiply(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t depth,
              int64_t columns) {
  for (int64_t left = columns / kLanes; left > 0;) {
    const int width = left == 5 || left == 6 ? 3
                      : left < 4             ? (int)left
                                             : 4; // 5 = 3 + 2 keeps more sums busy than 4 + 1
    switch (width) {
    case 1:
      multiply_strip<1, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    case 2:
      multiply_strip<2, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    case 3:
      multiply_strip<3, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    default:
      multiply_strip<4, kAdd>(a, b, b_row, c, c_row, rows, depth);
    }
    left -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

// Tiles.

#if defined(__AVX512F__)
template <int kPick> KVKEYE_INLINE Vf pick_quarters(Vf a, Vf b) {
  return (Vf)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, kPick);
}

KVKEYE_INLINE Vf low_pairs(Vf a, Vf b) {
  return (Vf)_mm512_maskz_unpacklo_pd(0xff, (__m512d)a, (__m512d)b);
}

KVKEYE_INLINE Vf high_pairs(Vf a, Vf b) {
  return (Vf)_mm512_maskz_unpackhi_pd(0xff, (__m512d)a, (__m512d)b);
}

// Four by four inside each quarter of the vectors, then the quarters.
KVKEYE_INLINE void transpose(Vf (&rows)[kLanes]) {
  Vf part[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const __m512 a = (__m512)rows[i], b = (__m512)rows[i + 1], c = (__m512)rows[i + 2],
                 d = (__m512)rows[i + 3];
    const Vf low = (Vf)_mm512_maskz_unpacklo_ps(0xffff, a, b),
             high = (Vf)_mm512_maskz_unpackhi_ps(0xffff, a, b);
    const Vf low_next = (Vf)_mm512_maskz_unpacklo_ps(0xffff, c, d);
    const Vf high_next = (Vf)_mm512_maskz_unpackhi_ps(0xffff, c, d);
    part[i] = low_pairs(low, low_next);
    part[i + 1] = high_pairs(low, low_next);
    part[i + 2] = low_pairs(high, high_next);
    part[i + 3] = high_pairs(high, high_next);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vf a = pick_quarters<0x44>(part[i], part[i + 4]), b = pick_quarters<0xee>(part[i], part[i + 4]);
    const Vf c = pick_quarters<0x44>(part[i + 8], part[i + 12]),
             d = pick_quarters<0xee>(part[i + 8], part[i + 12]);
    rows[i] = pick_quarters<0x88>(a, c);
    rows[i + 4] = pick_quarters<0xdd>(a, c);
    rows[i + 8] = pick_quarters<0x88>(b, d);
    rows[i + 12] = pick_quarters<0xdd>(b, d);
  }
}
#else
KVKEYE_INLINE void interleave(Vf a, Vf b, Vf& low, Vf& high) {
#if defined(__AVX2__)
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Interleaving the first half of the rows with the second transposes after log2(lanes) rounds.
KVKEYE_INLINE void transpose(Vf (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vf next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      rows[i] = next[i];
  }
}
#endif

// target[d, j] = rows[j][d], target [dim, kTile]; columns from count to the next whole vector are zero.
template <class T> void load_transposed(const T* const* rows, int count, int64_t dim, float* target) {
  for (int j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = dim - d < kLanes ? (int)(dim - d) : kLanes;
      Vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = j + i < count ? load(rows[j + i] + d, width) : Vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < width)
          store(target + (d + i) * kTile + j, block[i]);
    }
  }
}

// One row in fp32, zero from dim to the next whole vector.
template <class T> KVKEYE_INLINE void load_row(const T* source, int64_t dim, float* target) {
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes)); });
}

// Rows that the next tile will read: they lie a whole token apart, which no hardware prefetcher follows.
template <class T> KVKEYE_INLINE void prefetch_rows(const T* const* rows, int count, int64_t dim) {
  for (int j = 0; j < count; ++j)
    for (int64_t byte = 0; byte < dim * (int64_t)sizeof(T); byte += 64)
      __builtin_prefetch((const char*)rows[j] + byte, 0, 2);
}

template <class T> void load_rows(const T* const* rows, int count, int64_t dim, float* target) {
  for (int j = 0; j < count; ++j)
    load_row(rows[j], dim, target + j * round_up(dim));
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
