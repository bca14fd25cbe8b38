// Linear layers. Items are blocks of outputs times blocks of rows.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/kernel.h"

namespace kvkeye {

// y[m, o] = sum_k x[m, k] weight[o, k] + bias[o]: products enter one vector of fp32 sums in the order of k,
// its lanes are added in one order, and the result is rounded once. Which tile an element falls in does not
// matter.
template <class T> struct PackedLinearParams {
  const T* x;      // [rows, inputs], rows x_stride apart
  const T* weight; // [outputs, inputs], rows weight_stride apart
  const T* bias;   // [outputs] or null
  T* y;            // [rows, outputs]
  int64_t rows, inputs, outputs, x_stride, weight_stride;
  int64_t row_block; // rows of one item: their part of x stays in the second-level cache

  static constexpr int64_t output_block = 32;
  int64_t output_blocks() const { return blocks_of(outputs, output_block); }
  int64_t items() const { return output_blocks() * blocks_of(rows, row_block); }
};

KVKEYE_KERNEL(packed_linear, PackedLinearParams)

} // namespace kvkeye
