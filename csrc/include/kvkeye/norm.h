// Normalisations over the last axis. Items are rows, or blocks of kColumnBlock columns in the sums over rows.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// y = (x / sqrt(mean(x^2) + eps)).to(T) * weight; with a residual, x + residual comes first and is kept.
template <class T> struct RmsNormParams {
  const T* x;        // [rows, dim], rows x_stride apart
  const T* residual; // [rows, dim], rows residual_stride apart, or null
  const T* weight;   // [dim]
  T* y;              // [rows, dim]
  T* total;          // [rows, dim]: x + residual, or null
  int64_t dim, x_stride, residual_stride;
  float eps;
};

// y = (x - mean) / sqrt(var + eps) * weight + bias
template <class T> struct LayerNormParams {
  const T* x;      // [rows, dim], rows x_stride apart
  const T* weight; // [dim]
  const T* bias;   // [dim]
  T* y;            // [rows, dim]
  int64_t dim, x_stride;
  float eps;
};

// Gradients of all three. The kernel over rows writes the input gradients and the statistics of each row; the
// kernel over columns then sums the weight gradients with them.
template <class T> struct NormBackwardParams {
  const T* grad;       // [rows, dim]: of y
  const T* grad_total; // [rows, dim]: of total, or null
  const T* x;          // [rows, dim], rows x_stride apart
  const T* residual;   // [rows, dim], rows residual_stride apart, or null
  const T* weight;     // [dim]
  T* grad_x;           // [rows, dim]
  T* grad_residual;    // [rows, dim], or null
  T* grad_weight;      // [dim]
  T* grad_bias;        // [dim], or null
  float* mean;         // [rows], or null (root mean square)
  float* scale;        // [rows]: 1 / sqrt(var + eps)
  int64_t rows, dim, x_stride, residual_stride;
  float eps;
};

KVKEYE_KERNEL(rms_norm, RmsNormParams)
KVKEYE_KERNEL(layer_norm, LayerNormParams)
KVKEYE_KERNEL(norm_backward_rows, NormBackwardParams)
KVKEYE_KERNEL(norm_backward_columns, NormBackwardParams)

} // namespace kvkeye
