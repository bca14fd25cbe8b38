// One fp32 vector per instruction set, so that every kernel body is written once.
//
// The types are the compiler's own vector extension: + - * / and comparisons work as they are, and only what
// it cannot express (fused multiply-add, masked tails) names an intrinsic. Everything is always_inline and
// lives in the namespace of its instruction set: a function emitted with AVX-512 code must never be the copy
// that the linker keeps for the generic build. For the same reason kernels use no standard containers or
// algorithms.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/types.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef KVKEYE_ISA
#error "KVKEYE_ISA names the namespace of this build: generic, avx2 or avx512"
#endif

#define KVKEYE_INLINE static inline __attribute__((always_inline))
#define KVKEYE_LAMBDA __attribute__((always_inline))

namespace kvkeye::KVKEYE_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t Vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Vh __attribute__((vector_size(kLanes * 2)));

KVKEYE_INLINE Vf splat(float value) {
  return value - Vf{};
}

KVKEYE_INLINE Vf widen(Vh bits) {
#if defined(__AVX512F__) // the compiler would go by way of two halves
  return (Vf)((Vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return (Vf)(__builtin_convertvector(bits, Vu) << 16);
#endif
}

#if defined(__AVX512F__)
// The instruction that rounds to bf16 takes subnormal values for zero and keeps a NaN's digits; both are
// rare.
inline constexpr int kSubnormalOrNan = 0x20 | 0x80 | 0x01;
#endif

// Round to nearest, ties to even; a NaN stays a quiet NaN.
KVKEYE_INLINE Vh narrow(Vf value) {
#if defined(__AVX512F__)
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)value, kSubnormalOrNan) == 0, 1))
    return (Vh)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)value);
#endif
  const Vu bits = (Vu)value;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vu quiet = Vu{} + 0x7fc0u;
  return __builtin_convertvector(value == value ? rounded : quiet, Vh);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
KVKEYE_INLINE __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// Loads and stores. With a count, only the first `count` lanes touch memory and the others read as zero.

KVKEYE_INLINE Vf load(const float* source) {
  Vf value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

KVKEYE_INLINE Vf load(const bf16* source) {
  Vh bits;
  std::memcpy(&bits, source, sizeof bits);
  return widen(bits);
}

KVKEYE_INLINE void store(float* target, Vf value) {
  std::memcpy(target, &value, sizeof value);
}

KVKEYE_INLINE void store(bf16* target, Vf value) {
  const Vh bits = narrow(value);
  std::memcpy(target, &bits, sizeof bits);
}

KVKEYE_INLINE Vf load(const float* source, int count) {
  if (count == kLanes)
    return load(source);
#if defined(__AVX512F__)
  return (Vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), source);
#elif defined(__AVX2__)
  return (Vf)_mm256_maskload_ps(source, first_lanes(count));
#else
  Vf value{};
  std::memcpy(&value, source, sizeof(float) * count);
  return value;
#endif
}

KVKEYE_INLINE Vf load(const bf16* source, int count) {
  if (count == kLanes)
    return load(source);
#if defined(__AVX512F__)
  return widen((Vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), source));
#else
  Vh bits{};
  std::memcpy(&bits, source, sizeof(bf16) * count);
  return widen(bits);
#endif
}

KVKEYE_INLINE void store(float* target, Vf value, int count) {
  if (count == kLanes)
    return store(target, value);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, (__mmask16)((1u << count) - 1), (__m512)value);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(target, first_lanes(count), (__m256)value);
#else
  std::memcpy(target, &value, sizeof(float) * count);
#endif
}

KVKEYE_INLINE void store(bf16* target, Vf value, int count) {
  if (count == kLanes)
    return store(target, value);
  const Vh bits = narrow(value);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(target, (__mmask16)((1u << count) - 1), (__m256i)bits);
#else
  std::memcpy(target, &bits, sizeof(bf16) * count);
#endif
}

// The value as it reads back after being stored as T.
template <class T> KVKEYE_INLINE Vf rounded(Vf value);
template <> inline __attribute__((always_inline)) Vf rounded<float>(Vf value) {
  return value;
}
template <> inline __attribute__((always_inline)) Vf rounded<bf16>(Vf value) {
  const Vu bits = (Vu)value;
  const Vu nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return value == value ? (Vf)nearest : (Vf)(Vu{} + 0x7fc00000u);
}

// Arithmetic.

KVKEYE_INLINE Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b, so b where one is a NaN; in one instruction, which the compiler does not
// find.
KVKEYE_INLINE Vf max(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
KVKEYE_INLINE Vf min(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// The lanes that reach a bound: one bit for each; a sum to which only they are added.
KVKEYE_INLINE uint32_t bits_from(Vf x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)splat(bound), _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    bits |= (uint32_t)(x[lane] >= bound) << lane;
  return bits;
#endif
}
KVKEYE_INLINE Vf add_from(Vf sum, Vf x, float bound) {
#if defined(__AVX512F__)
  const __mmask16 reach = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GE_OQ);
  return (Vf)_mm512_mask_add_ps((__m512)sum, reach, (__m512)sum, (__m512)x);
#else
  return sum + (x >= bound ? x : Vf{});
#endif
}

// Sum and maximum over the lanes, halving each time (lane i meets lane i + half): one order for each
// instruction set, without a way through memory.
typedef float V4 __attribute__((vector_size(16)));
#if defined(__AVX2__)
typedef float V8 __attribute__((vector_size(32)));
#endif

template <class Join> KVKEYE_INLINE float reduce(Vf value, Join join) {
#if defined(__AVX512F__)
  const V8 eight = join(__builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7),
                        __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15));
#elif defined(__AVX2__)
  const V8 eight = value;
#endif
#if defined(__AVX2__)
  const V4 four = join(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                       __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
#else
  const V4 four = value;
#endif
  const V4 two = join(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return join(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}

KVKEYE_INLINE float sum(Vf value) {
  return reduce(value, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

KVKEYE_INLINE float largest(Vf value) {
  return reduce(value, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// exp(x) for x in [-104, 89], at most 2 ulp: x = n ln2 + r with |r| <= ln2 / 2, a Taylor polynomial of degree
// 7 in r (remainder 5e-9), and 2^n applied in two halves so that subnormal results are reached. NaN stays.
KVKEYE_INLINE Vf exp_between(Vf x) {
  const Vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  const Vf n = fma(x, splat(1.44269504088896341f), magic) - magic;
  Vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440054690583e-4f), r);
  Vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
  return (Vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const Vi exponent = __builtin_convertvector(n, Vi);
  const Vi low = exponent >> 1;
  return p * (Vf)((low + 127) << 23) * (Vf)((exponent - low + 127) << 23);
#endif
}

// The same for every x: exp(-inf) = 0, exp(inf) = inf.
KVKEYE_INLINE Vf exp(Vf x) {
  return exp_between(max(splat(-104.0f), min(splat(89.0f), x))); // in this order a NaN passes
}

// exp(x) for x <= 0, 0 below -87: subnormal results take a processor many times as long.
KVKEYE_INLINE Vf exp_or_zero(Vf x) {
  const Vf value = exp_between(max(splat(-87.0f), x));
  return x < -87.0f ? Vf{} : value;
}

// Lanes from `count` on made zero: a partial load reads zeros there, but arithmetic may have changed them.
KVKEYE_INLINE Vf keep(Vf value, int count) {
  if (count == kLanes)
    return value;
  float lane[kLanes] = {};
  store(lane, value, count);
  return load(lane);
}

// Calls body(offset, lanes) over [begin, end): whole vectors first, then the rest as a partial one.
template <class Body> KVKEYE_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    body(i, kLanes);
  if (i < end)
    body(i, (int)(end - i));
}

template <class Body> KVKEYE_INLINE void for_vectors(int64_t size, Body body) {
  for_vectors(0, size, body);
}

// Sums of long rows are summed in three levels of 16: the rounding error grows with the levels, not with the
// length.

// part(begin, end) sums the lowest level, of at most 16 vectors from a whole vector on.
template <class Part> KVKEYE_INLINE float sum_levels(int64_t size, Part part) {
  constexpr int64_t low = 16 * kLanes, high = 16 * low;
  Vf total{};
  for (int64_t outer = 0; outer < size; outer += high) {
    const int64_t outer_end = outer + high < size ? outer + high : size;
    Vf middle{};
    for (int64_t inner = outer; inner < outer_end; inner += low)
      middle += part(inner, inner + low < size ? inner + low : size);
    total += middle;
  }
  return sum(total);
}

// The sum of term(offset, lanes) over [0, size), in one order.
template <class Term> KVKEYE_INLINE float sum_vectors(int64_t size, Term term) {
  return sum_levels(size, [&](int64_t begin, int64_t end) KVKEYE_LAMBDA {
    Vf part{};
    for_vectors(begin, end, [&](int64_t i, int lanes) KVKEYE_LAMBDA { part += term(i, lanes); });
    return part;
  });
}

// out[i] = the sum over rows of term(row, i, lanes), for one block of kColumnBlock columns: how the gradient
// of a weight is reduced. The rows are walked in one order, so the number of threads cannot show.
template <class T, class Term>
KVKEYE_INLINE void sum_rows(int64_t block, int64_t columns, int64_t rows, T* out, Term term) {
  const int64_t first = block * kColumnBlock;
  const int64_t last = first + kColumnBlock < columns ? first + kColumnBlock : columns;
  for_vectors(first, last, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    Vf total{};
    for (int64_t outer = 0; outer < rows; outer += 256) {
      Vf middle{};
      for (int64_t inner = outer; inner < rows && inner < outer + 256; inner += 16) {
        Vf part{};
        for (int64_t row = inner; row < rows && row < inner + 16; ++row)
          part += term(row, i, lanes);
        middle += part;
      }
      total += middle;
    }
    store(out + i, total, lanes);
  });
}

} // namespace kvkeye::KVKEYE_ISA
