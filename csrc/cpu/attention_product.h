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

// Transposition.

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

// How the kernels multiply: what a word (4 bytes) of a factor holds, and how a tile is brought into words.

template <class Product> constexpr int64_t words_of(int64_t dim) {
  return (dim + Product::per_word - 1) / Product::per_word;
}

// target [kTile, width]: rows in words, zeros behind their ends up to a whole vector.
template <class Product, class T>
KVKEYE_APART void load_tile(const T* const* rows, int count, int64_t dim, float* target, int64_t width) {
  const int64_t words = words_of<Product>(dim);
  for (int j = 0; j < count; ++j)
    for (int64_t w = 0; w < words; w += kLanes)
      store(target + j * width + w, Product::load_words(rows[j], w, dim));
}

// One row in fp32, zero from dim to the next whole vector.
template <class T> KVKEYE_INLINE void load_row(const T* source, int64_t dim, float* target) {
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes)); });
}

// Rows that the next tile will read: they lie a whole token apart, which no hardware prefetcher follows.
// Asked for a few at a time: the core waits for no more lines.
template <class T> KVKEYE_INLINE void prefetch_rows(const T* const* rows, int count, int64_t dim) {
  for (int j = 0; j < count; ++j)
    for (int64_t byte = 0; byte < dim * (int64_t)sizeof(T); byte += 64)
      __builtin_prefetch((const char*)rows[j] + byte, 0, 2);
}

template <class T> struct Ahead {
  const T* const* rows;
  int left, step; // rows
  int64_t dim;

  KVKEYE_LAMBDA void advance() {
    const int count = step < left ? step : left;
    prefetch_rows(rows, count, dim);
    rows += count;
    left -= count;
  }
};

template <class T> void load_rows(const T* const* rows, int count, int64_t dim, float* target) {
  for (int j = 0; j < count; ++j)
    load_row(rows[j], dim, target + j * round_up(dim));
}

// A word is one fp32.
struct Single {
  static constexpr int per_word = 1;
  KVKEYE_INLINE Vf multiply(Vf a, Vf b, Vf total) { return fma(a, b, total); }

  // Queries carry the scale, so that scores need none.
  KVKEYE_INLINE float unit_of(float) { return 1.0f; }
  template <class T> KVKEYE_INLINE Vf load_query(const T* row, int64_t word, int64_t dim, float scale) {
    return load_words(row, word, dim) * scale;
  }

  // Words [word, word + kLanes) of a row, zeros behind its end.
  template <class T> KVKEYE_INLINE Vf load_words(const T* row, int64_t word, int64_t dim) {
    return load(row + word, dim - word < kLanes ? (int)(dim - word) : kLanes);
  }

  // target [kTile, width].
  template <class T> static void load_values(const T* const* rows, int count, int64_t dim, float* target) {
    for (int j = 0; j < count; ++j)
      load_row(rows[j], dim, target + j * padded_dim(dim));
  }

  // Two neighbouring keys' weights, which lie `next` apart.
  KVKEYE_INLINE void store_weights(float* target, int64_t next, Vf first, Vf second) {
    store(target, first);
    store(target + next, second);
  }

  // Rows of N vectors, `step` apart, to target in rows of `width` words.
  template <int N>
  static void gather_rows(const float* source, int64_t step, int rows, float* target, int64_t width) {
    for (int j = 0; j < rows; ++j)
      for (int n = 0; n < N; ++n)
        store(target + j * width + n * kLanes, load(source + j * step + n * kLanes));
  }

  // One row's weights of two vectors of keys.
  KVKEYE_INLINE void store_row_weights(float* target, Vf first, Vf second) {
    store_weights(target, kLanes, first, second);
  }
};

#if defined(__AVX512BF16__)
// A word is two bf16, neighbours in depth, of which the lower comes first; vdpbf16ps multiplies and adds
// both.
struct Paired {
  static constexpr int per_word = 2;
  KVKEYE_INLINE Vf multiply(Vf a, Vf b, Vf total) {
    return (Vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
  }

  // Queries stay as they are, but for the sign of the scale; scores are multiplied by its magnitude.
  KVKEYE_INLINE float unit_of(float scale) { return scale == 0.0f ? 1.0f : scale < 0.0f ? -scale : scale; }
  KVKEYE_INLINE Vf load_query(const bf16* row, int64_t word, int64_t dim, float scale) {
    const uint32_t sign = scale < 0.0f ? 0x80008000u : 0u, kept = scale == 0.0f ? 0u : ~0u;
    return (Vf)(((Vu)load_words(row, word, dim) ^ sign) & kept);
  }

  KVKEYE_INLINE Vf load_words(const bf16* row, int64_t word, int64_t dim) {
    const int64_t left = dim - 2 * word;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    return (Vf)_mm512_maskz_loadu_epi16(mask, row + 2 * word);
  }

  // Two vectors of 32 elements as 32 words of one element of each.
  KVKEYE_INLINE void interleave(Vf even, Vf odd, Vf& low, Vf& high) {
    alignas(64) static constexpr uint16_t from[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    low = (Vf)_mm512_permutex2var_epi16((__m512i)even, _mm512_load_si512(from), (__m512i)odd);
    high = (Vf)_mm512_permutex2var_epi16((__m512i)even, _mm512_load_si512(from + 32), (__m512i)odd);
  }

  // target [kTile / 2, width]; zeros behind the last key.
  static void load_values(const bf16* const* rows, int count, int64_t dim, float* target) {
    const int64_t width = padded_dim(dim);
    for (int j = 0; j < count; j += 2, target += width)
      for (int64_t d = 0; d < dim; d += 32) {
        const Vf odd = j + 1 < count ? load_words(rows[j + 1], d / 2, dim) : Vf{};
        Vf low, high;
        interleave(load_words(rows[j], d / 2, dim), odd, low, high);
        store(target + d, low);
        if (d + 16 < width)
          store(target + d + 16, high);
      }
  }

  // 32 weights as bf16, those of `first` before those of `second`.
  KVKEYE_INLINE Vf narrow_weights(Vf first, Vf second) {
    return (Vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }

  KVKEYE_INLINE void store_weights(float* target, int64_t, Vf first, Vf second) {
    alignas(64) static constexpr uint16_t from[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i weights = (__m512i)narrow_weights(first, second);
    store(target, (Vf)_mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(from), weights));
  }

  template <int N>
  static void gather_rows(const float* source, int64_t step, int rows, float* target, int64_t width) {
    for (int j = 0; j < rows; ++j, source += step, target += width) {
      for (int n = 0; n + 2 <= N; n += 2)
        store(target + n * 8, narrow_weights(load(source + n * 16), load(source + n * 16 + 16)));
      if (N % 2 != 0)
        _mm256_storeu_si256((__m256i*)(target + N / 2 * 16),
                            (__m256i)_mm512_cvtneps_pbh((__m512)load(source + (N - 1) * 16)));
    }
  }

  KVKEYE_INLINE void store_row_weights(float* target, Vf first, Vf second) {
    store(target, narrow_weights(first, second));
  }
};
#endif

} // namespace
} // namespace kvkeye::KVKEYE_ISA
