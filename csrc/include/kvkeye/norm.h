// Normalisations over the last axis. Items are rows.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// y = (x / sqrt(mean(x^2) + eps)).to(T) * weight
template <class T> struct RmsNormParams {
  const T* x;      // [rows, dim], rows x_stride apart
  const T* weight; // [dim]
  T* y;            // [rows, dim]
  int64_t dim, x_stride;
  float eps;
};

KVKEYE_KERNEL(rms_norm, RmsNormParams)

} // namespace kvkeye
