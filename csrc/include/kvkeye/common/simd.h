// One fp32 vector per instruction set, so that every kernel body is written once.
//
// The types are the compiler's own vector extension: + - * / and comparisons work as they are, and only what
// it cannot express (fused multiply-add, masked tails) names an intrinsic. Everything is always_inline and
// lives in the namespace of its instruction set: a function emitted with AVX-512 code must never be the copy
// that the linker keeps for the generic build. For the same reason kernels use no standard containers or
// algorithms.
#pragma once

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
  return (Vf)(__builtin_convertvector(bits, Vu) << 16);
}

// Round to nearest, ties to even; a NaN stays a quiet NaN.
KVKEYE_INLINE Vh narrow(Vf value) {
  const Vu bits = (Vu)value;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vu quiet = Vu{} + 0x7fc0u;
  return __builtin_convertvector(value == value ? rounded : quiet, Vh);
}

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
  return widen(narrow(value));
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

KVKEYE_INLINE Vf max(Vf a, Vf b) {
  return a > b ? a : b;
}
KVKEYE_INLINE Vf min(Vf a, Vf b) {
  return a < b ? a : b;
}

// Sum and maximum over the lanes, halving each time: one order for each instruction set.
KVKEYE_INLINE float sum(Vf value) {
  float lane[kLanes];
  std::memcpy(lane, &value, sizeof value);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] += lane[i + half];
  return lane[0];
}

KVKEYE_INLINE float largest(Vf value) {
  float lane[kLanes];
  std::memcpy(lane, &value, sizeof value);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// exp(x), at most 2 ulp: x = n ln2 + r with |r| <= ln2 / 2, a Taylor polynomial of degree 7 in r (remainder
// 5e-9), and 2^n applied in two halves so that subnormal results are reached. exp(-inf) = 0, exp(inf) = inf,
// NaN stays.
KVKEYE_INLINE Vf exp(Vf x) {
  const Vf clamped = max(min(x, splat(89.0f)), splat(-104.0f));
  const Vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  const Vf n = fma(clamped, splat(1.44269504088896341f), magic) - magic;
  Vf r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440054690583e-4f), r);
  Vf p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + 1.0f;
  const Vi exponent = __builtin_convertvector(n, Vi);
  const Vi low = exponent >> 1;
  const Vf result = p * (Vf)((low + 127) << 23) * (Vf)((exponent - low + 127) << 23);
  return x == x ? result : x;
}

// Calls body(offset, lanes) over [0, size): whole vectors first, then the rest as a partial one.
template <class Body> KVKEYE_INLINE void for_vectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    body(i, kLanes);
  if (i < size)
    body(i, (int)(size - i));
}

} // namespace kvkeye::KVKEYE_ISA
