// e4m3 to bf16 and back, in steps that every target has.
#pragma once

#include "kvkeye/common/e4m3.h"

#include "ptx.h"

#include <type_traits>

namespace kvkeye::cuda {

template <class T> constexpr bool kIsE4m3 = std::is_same_v<T, e4m3>;

// Exponent and mantissa of e4m3 in those of bf16 are 2^-120 of the value, the subnormal ones too.
__device__ __forceinline__ uint32_t times_2_120(uint32_t pair) {
  return multiply_bf16(pair, 0x7b807b80u);
}

// Numbers 0 and 2 of the four in a word, exactly.
__device__ __forceinline__ uint32_t even_of(uint32_t word) {
  return times_2_120((word << 4 & 0x07f007f0u) | (word << 8 & 0x80008000u));
}

// Numbers 1 and 3.
__device__ __forceinline__ uint32_t odd_of(uint32_t word) {
  return times_2_120((word >> 4 & 0x07f007f0u) | (word & 0x80008000u));
}

// Grows with |x|; infinity and NaN are the largest.
__device__ __forceinline__ uint32_t magnitude_of(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

// The scale of a row, NaN if a value of it is not finite.
__device__ __forceinline__ float scale_of(uint32_t largest_magnitude) {
  const bool is_finite = largest_magnitude < 0x7f800000u;
  return is_finite ? __uint_as_float(largest_magnitude) / kMostE4m3 : __uint_as_float(0x7fc00000u);
}

// x / scale to nearest even; 0 where the scale is 0 or NaN.
__device__ __forceinline__ uint32_t level_of(float x, float scale) {
  if (!(scale > 0.0f))
    return 0;
  const float level = x / scale, size = fminf(fabsf(level), kMostE4m3);
  const uint32_t bits = __float_as_uint(size);
  const uint32_t normal = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
  const uint32_t code = size < 0x1p-6f ? (uint32_t)rintf(size * 512.0f) : normal;
  return code | (__float_as_uint(level) >> 24 & 0x80u);
}

} // namespace kvkeye::cuda
