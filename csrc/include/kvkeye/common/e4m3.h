// Eight-bit caches: levels and a scale per row.
#pragma once

#include "kvkeye/common/types.h"

namespace kvkeye {

// Sign, 4 bits of exponent with bias 7, 3 of mantissa; the largest value is 448. Seven bits of 1 are NaN,
// which no cache has: the scale of such a row is NaN.
struct e4m3 {
  uint8_t bits;
};

constexpr float kMostE4m3 = 448.0f;

// What a kernel computes with beside a cache of C.
template <class C> struct BesideCache {
  using Type = C;
};
template <> struct BesideCache<e4m3> {
  using Type = bf16;
};

// fp32 scales of cache rows, laid out as the cache is without its last axis; only e4m3 has them.
template <class C, class Scale> struct CacheScales {};
template <class Scale> struct CacheScales<e4m3, Scale> {
  Scale *k_scales, *v_scales; // [blocks, num_kv_heads, block_size]
};

} // namespace kvkeye
