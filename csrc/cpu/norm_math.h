// The root mean square of a row: shared by the norms and by the rotation that begins with one.
#pragma once

#include "kvkeye/common/simd_pairs.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

template <class T> KVKEYE_INLINE float sum_of_squares(const T* x, int64_t dim) {
  return sum_of(x, dim, [](Vf value) KVKEYE_LAMBDA { return value * value; });
}

KVKEYE_INLINE float inverse_root(float squares, int64_t dim, float eps) {
  return 1.0f / std::sqrt(squares / (float)dim + eps);
}

template <class T> KVKEYE_INLINE float inverse_root(const T* x, int64_t dim, float eps) {
  return inverse_root(sum_of_squares(x, dim), dim, eps);
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
