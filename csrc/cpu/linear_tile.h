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
constexpr int kTileRows = 12, kTileVectors = 2; // 24 sums, 2 weights and 1 input in 32 registers
#else
constexpr int kTileRows = 4, kTileVectors = 2; // 8 sums, 2 weights and 1 input in 16 registers
#endif

KVKEYE_INLINE Vf upper(Vf pairs) {
  return (Vf)((Vu)pairs & 0xffff0000u);
}
KVKEYE_INLINE Vf lower(Vf pairs) {
  return (Vf)((Vu)pairs << 16);
}

// How words of 4 bytes are multiplied: `inputs` brings those of a row into the form of each of the `steps` of
// a word, `weight` those of a weight. A row of a chunk's inputs takes `row_words`. Where there are two steps,
// weights in both forms are words of a product of one step, `Wide`.

// Nothing to bring into form.
template <int RowWords> struct AsTheyAre {
  static constexpr int steps = 1, row_words = RowWords;
  KVKEYE_INLINE void inputs(const uint32_t* words, int count, float* out) {
    std::memcpy(out, words, 4 * count);
  }
  KVKEYE_INLINE Vf weight(Vf word, int) { return word; }
};

// One fp32.
struct Single : AsTheyAre<128> {
  using Sum = Vf;
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) { return fma(x, w, total); }
};

// Two bf16, widened here: the upper product enters the sum first, as vdpbf16ps does it.
struct Widened {
  using Sum = Vf;
  using Wide = Single;
  static constexpr int steps = 2, row_words = 128;
  KVKEYE_INLINE void inputs(const uint32_t* pairs, int count, float* out) {
    for (int i = 0; i < count; i += kLanes) {
      Vu bits;
      std::memcpy(&bits, pairs + i, sizeof bits);
      bits = bits << 16 | bits >> 16;
      Vh half[2];
      std::memcpy(half, &bits, sizeof bits);
      store(out + 2 * i, widen(half[0]));
      store(out + 2 * i + kLanes, widen(half[1]));
    }
  }
  KVKEYE_INLINE Vf weight(Vf word, int step) { return step == 0 ? upper(word) : lower(word); }
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) { return fma(x, w, total); }
};

#if defined(__AVX512BF16__)
// Two bf16 in one instruction, which is two fused multiply-adds. Some CPUs need more time for it than for
// those two.
struct Paired : AsTheyAre<64> {
  using Sum = Vf;
  KVKEYE_INLINE Vf multiply(Vf x, Vf w, Vf total) {
    return (Vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)w);
  }
};
#endif

typedef int16_t Vs __attribute__((vector_size(kLanes * 4)));

// x[0] w[0] + x[1] w[1] of pairs of int16.
KVKEYE_INLINE Vi pair_products(Vs x, Vs w) {
#if defined(__AVX512F__)
  return (Vi)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
  return (Vi)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
  return (Vi)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
  return ((Vi)x << 16 >> 16) * ((Vi)w << 16 >> 16) + ((Vi)x >> 16) * ((Vi)w >> 16);
#endif
}

// Two int16.
struct Int16Pairs : AsTheyAre<128> {
  using Sum = Vi;
  KVKEYE_INLINE Vi multiply(Vf x, Vf w, Vi total) { return total + pair_products((Vs)x, (Vs)w); }
};

// Four int8 times four uint8 as two pairs of int16, neighbours but one: 8 bits times 8 bits would not fit
// into the saturated sums of vpmaddubsw.
struct Int8Pairs {
  using Sum = Vi;
  using Wide = Int16Pairs;
  static constexpr int steps = 2, row_words = 128;
  KVKEYE_INLINE void inputs(const uint32_t* words, int count, float* out) {
    for (int i = 0; i < count; ++i) {
      int8_t x[4];
      std::memcpy(x, words + i, sizeof x);
      const int16_t pairs[4] = {x[0], x[2], x[1], x[3]};
      std::memcpy(out + 2 * i, pairs, sizeof pairs);
    }
  }
  KVKEYE_INLINE Vf weight(Vf word, int step) { return (Vf)((Vu)word >> 8 * step & 0x00ff00ffu); }
  KVKEYE_INLINE Vi multiply(Vf x, Vf w, Vi total) { return Int16Pairs::multiply(x, w, total); }
};

#if defined(__AVX512VNNI__)
// Four int8 times four uint8 in one instruction.
struct Int8Quads : AsTheyAre<64> {
  using Sum = Vi;
  KVKEYE_INLINE Vi multiply(Vf x, Vf w, Vi total) {
    return (Vi)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, (__m512i)x);
  }
};
#else
using Int8Quads = Int8Pairs;
#endif

// total[m][o] (+)= the sum over the words of a chunk of x[m] w[o]. Inputs of a row lie together. `Lines`
// cache lines at `next` are asked for with every word, into the second level: fills of the first would take
// the turns of the loads.
template <class Product, int M, int N, int Lines>
void multiply(const float* x, const float* w, int words, float* total, bool first, const char* next) {
  using Sum = typename Product::Sum;
  for (int o = 0; o < kPanel; o += N * kLanes) {
    Sum sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[m][n] = Sum{};
    for (int k = 0; k < words; ++k) {
      for (int line = 0; line < Lines && o == 0; ++line)
        __builtin_prefetch(next + (k * Lines + line) * 64, 0, 2);
#pragma GCC unroll 2
      for (int step = 0; step < Product::steps; ++step) {
        Vf weight[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n)
          weight[n] = Product::weight(load(w + k * kPanel + o + n * kLanes), step);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const Vf input = splat(x[m * Product::row_words + k * Product::steps + step]);
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
        store(at, (Vf)(first ? sum[m][n] : (Sum)load(at) + sum[m][n]));
      }
  }
}

// The tile of `rows` rows, at most Rows of them.
template <class Product, int Lines, int Rows = kTileRows>
KVKEYE_INLINE void multiply_tile(const float* x, const float* w, int words, int rows, float* total,
                                 bool first, const char* next) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      return multiply<Product, Rows, kTileVectors, Lines>(x, w, words, total, first, next);
    multiply_tile<Product, Lines, Rows - 1>(x, w, words, rows, total, first, next);
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

} // namespace
} // namespace kvkeye::KVKEYE_ISA
