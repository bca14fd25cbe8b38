// Linear layers of int8 weights: rows are quantised as they come, sums are exact.
#pragma once

#include "kvkeye/linear.h"

namespace kvkeye {

// A row of numbers is `levels` times one scale: the largest magnitude is level 127. A row that has an
// infinity or a NaN has the scale NaN; one without a magnitude of at least kLeastMagnitude counts as zero.
inline constexpr int kMaxLevel = 127;
inline constexpr float kLeastMagnitude = 1e-30f;
inline constexpr int kZeroLevel = 128;                         // how a stored weight reads level 0
inline constexpr int64_t kMaxInputs = INT32_MAX / (255 * 127); // whose sum cannot overflow

// Rows of inputs -> records of record_bytes each: levels, zeros up to record_levels, then Scale.
template <class T> struct QuantizeRowsParams {
  const T* x; // [rows, inputs], rows x_stride apart
  int8_t* records;
  int64_t inputs, x_stride;
  int64_t record_levels;

  struct Scale {
    float scale;
    int32_t sum; // of the levels
  };
  int64_t record_bytes() const { return record_levels + 64; }
};

// A weight -> uint8 levels + kZeroLevel, packed as any weight, and a scale for every output.
template <class T> struct QuantizeWeightParams {
  const T* weight; // [parts * outputs, inputs], rows weight_stride apart
  uint8_t* packed; // [blocks, parts, words, kPanel, 4]
  float* scales;   // [parts * outputs]
  int64_t inputs, outputs, weight_stride;
  int64_t parts;

  int64_t words() const { return blocks_of(inputs, 4); }
  int64_t items() const { return blocks_of(outputs, kPanel) * parts; }
};

// y = epilogue(sum(levels of x, levels of W) * scale of the row * scale of the output + b). The sum is of
// integers: no order, no instruction set changes it.
template <class T> struct Int8LinearParams : LinearCut {
  using Input = int8_t;
  using Output = T;
  const int8_t* x;      // records of quantize_rows, x_stride bytes apart
  const int8_t* weight; // bytes of quantize_weight
  const float* scales;  // [parts * outputs]
  const T* bias;        // [outputs] or null; one part only
  const T* residual;    // add: [rows, outputs], rows residual_stride apart
  T* y;                 // [rows, outputs]
  int64_t x_stride, residual_stride;
  int64_t record_levels;
  static constexpr bool packed = true;
  static constexpr int64_t weight_stride = 0;
};

KVKEYE_KERNEL(quantize_rows, QuantizeRowsParams)
KVKEYE_KERNEL(quantize_weight, QuantizeWeightParams)
KVKEYE_KERNEL(int8_linear, Int8LinearParams)

} // namespace kvkeye
