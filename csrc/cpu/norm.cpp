// Normalisations over the last axis, forward and backward.
#include "kvkeye/norm.h"
#include "kvkeye/common/simd.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

template <class T> KVKEYE_INLINE float sum_of_squares(const T* x, int64_t dim) {
  Vf total{};
  for_vectors(dim, [&](int64_t i, int lanes) __attribute__((always_inline)) {
    const Vf value = load(x + i, lanes);
    total = fma(value, value, total);
  });
  return sum(total);
}

} // namespace

template <class T> void rms_norm(const RmsNormParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.x_stride;
    T* y = p.y + row * p.dim;
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, p.dim) / (float)p.dim + p.eps);
    for_vectors(p.dim, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(y + i, rounded<T>(load(x + i, lanes) * scale) * load(p.weight + i, lanes), lanes);
    });
  }
}

KVKEYE_INSTANTIATE(rms_norm, RmsNormParams)

} // namespace kvkeye::KVKEYE_ISA
