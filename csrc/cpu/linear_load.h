// Operands of a chunk: inputs row by row, weights with outputs as neighbours.
#pragma once

#include "linear_tile.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// `count` values of a row -> inputs as Product takes them, zeros up to a whole word.
template <class T, class Product> KVKEYE_INLINE void load_inputs(const T* x, int count, float* out) {
  constexpr int chunk = kInputChunk<T>;
  if (count == chunk)
    return Product::inputs((const uint32_t*)x, chunk * sizeof(T) / 4, out);
  alignas(64) T padded[chunk] = {};
  std::memcpy(padded, x, sizeof(T) * count);
  Product::inputs((const uint32_t*)padded, chunk * sizeof(T) / 4, out);
}

// Words of a weight -> twice as many in the form of each step.
template <class Product> KVKEYE_INLINE void widen_weights(const float* packed, int words, float* w) {
  for (int k = 0; k < words; ++k)
#pragma GCC unroll 16
    for (int o = 0; o < kPanel; o += kLanes) {
      const Vf word = load(packed + k * kPanel + o);
      store(w + 2 * k * kPanel + o, Product::weight(word, 0));
      store(w + (2 * k + 1) * kPanel + o, Product::weight(word, 1));
    }
}

// 16 rows of 16 words at row[r] + offset -> w[word][row], rows of w kPanel words apart.
#if defined(__AVX512F__)
KVKEYE_INLINE __m512 four_rows(const char* const* row, int64_t offset) {
  const auto quad = [&](int r) KVKEYE_LAMBDA { return _mm_loadu_ps((const float*)(row[r] + offset)); };
  __m512 value = _mm512_castps128_ps512(quad(0));
  value = _mm512_maskz_insertf32x4(0xffff, value, quad(4), 1);
  value = _mm512_maskz_insertf32x4(0xffff, value, quad(8), 2);
  return _mm512_maskz_insertf32x4(0xffff, value, quad(12), 3);
}

KVKEYE_INLINE void transpose(const char* const* row, int64_t offset, float* w) {
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += 4, offset += 16) { // 4 words of 16 rows: 4 x 4 in each of 4 lanes
    const __m512 p = four_rows(row, offset), q = four_rows(row + 1, offset);
    const __m512 r = four_rows(row + 2, offset), s = four_rows(row + 3, offset);
    const __m512d a = (__m512d)_mm512_maskz_unpacklo_ps(0xffff, p, q);
    const __m512d b = (__m512d)_mm512_maskz_unpackhi_ps(0xffff, p, q);
    const __m512d d = (__m512d)_mm512_maskz_unpacklo_ps(0xffff, r, s);
    const __m512d e = (__m512d)_mm512_maskz_unpackhi_ps(0xffff, r, s);
    store(w + c * kPanel, (Vf)_mm512_maskz_unpacklo_pd(0xff, a, d));
    store(w + (c + 1) * kPanel, (Vf)_mm512_maskz_unpackhi_pd(0xff, a, d));
    store(w + (c + 2) * kPanel, (Vf)_mm512_maskz_unpacklo_pd(0xff, b, e));
    store(w + (c + 3) * kPanel, (Vf)_mm512_maskz_unpackhi_pd(0xff, b, e));
  }
}
#else
KVKEYE_INLINE void transpose(const char* const* row, int64_t offset, float* w) {
  for (int r = 0; r < 16; r += 4)
    for (int c = 0; c < 16; c += 4) {
      V4 value[4];
      for (int i = 0; i < 4; ++i)
        std::memcpy(&value[i], row[r + i] + offset + 4 * c, 16);
      const V4 a = __builtin_shufflevector(value[0], value[1], 0, 4, 1, 5);
      const V4 b = __builtin_shufflevector(value[0], value[1], 2, 6, 3, 7);
      const V4 d = __builtin_shufflevector(value[2], value[3], 0, 4, 1, 5);
      const V4 e = __builtin_shufflevector(value[2], value[3], 2, 6, 3, 7);
      value[0] = __builtin_shufflevector(a, d, 0, 1, 4, 5);
      value[1] = __builtin_shufflevector(a, d, 2, 3, 6, 7);
      value[2] = __builtin_shufflevector(b, e, 0, 1, 4, 5);
      value[3] = __builtin_shufflevector(b, e, 2, 3, 6, 7);
      for (int i = 0; i < 4; ++i)
        std::memcpy(w + (c + i) * kPanel + r, &value[i], 16);
    }
}
#endif

// A panel of a weight as it lies in memory: one pointer per output.
template <class T> struct PanelRows {
  const T* row[kPanel];

  // Past the last output its row stands in: what it gives is not stored.
  KVKEYE_INLINE PanelRows at(const T* weight, int64_t stride, int64_t outputs) {
    PanelRows found;
    for (int o = 0; o < kPanel; ++o)
      found.row[o] = weight + (o < outputs ? o : outputs - 1) * stride;
    return found;
  }

  // Inputs [k, k + count) of all outputs -> w [words, kPanel], zeros up to a multiple of 16 words.
  KVKEYE_INLINE void pack(const PanelRows& rows, int64_t k, int count, float* w) {
    constexpr int values = 64 / sizeof(T); // of one row in one transposition
    for (int done = 0; done < count; done += values, w += 16 * kPanel)
      for (int o = 0; o < kPanel; o += 16) {
        const char* source[16];
        alignas(64) T rest[16][values];
        const bool whole = count - done >= values;
        if (!whole)
          std::memset(rest, 0, sizeof rest);
        for (int r = 0; r < 16; ++r) {
          const T* from = rows.row[o + r] + k + done;
          if (!whole)
            std::memcpy(rest[r], from, sizeof(T) * (count - done));
          source[r] = whole ? (const char*)from : (const char*)rest[r];
        }
        transpose(source, 0, w + o);
      }
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
