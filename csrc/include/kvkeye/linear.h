// Linear layers. Items are blocks of rows times groups of panels of outputs.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/kernel.h"

namespace kvkeye {

inline constexpr int kPanel = 64;       // outputs side by side
inline constexpr int kInputChunk = 128; // inputs of one partial sum

// A packed weight is a row of panels of kPanel outputs, [words, kPanel] of 4 bytes each: an fp32, or two bf16
// that are neighbours in k. Missing outputs and inputs are zero. With two parts (gate and up), panels of the
// first and of the second half of the rows alternate.
template <class T> struct PackWeightParams {
  const T* weight; // [parts * outputs, inputs], rows weight_stride apart
  T* packed;       // [blocks, parts, words, kPanel, 4 / sizeof(T)]
  int64_t inputs, outputs, weight_stride;
  int64_t parts;

  int64_t words() const { return blocks_of(inputs, 4 / (int64_t)sizeof(T)); }
  int64_t items() const { return blocks_of(outputs, kPanel) * parts; }
};

// What becomes of x W^T + b, once it is rounded to T.
enum class Epilogue { none, gelu, gelu_tanh, add, silu_mul };

// y = epilogue(x W^T + b). An element: the products of kInputChunk inputs enter one fp32 sum in a fixed
// order, these sums are added in the order of k, then comes the bias. Rows beside it, its place in a tile and
// the form of the weight change nothing.
template <class T> struct LinearParams {
  const T* x;        // [rows, inputs], rows x_stride apart
  const T* weight;   // packed, or [parts * outputs, inputs], rows weight_stride apart
  const T* bias;     // [outputs] or null; one part only
  const T* residual; // add: [rows, outputs], rows residual_stride apart
  T* y;              // [rows, outputs]
  int64_t rows, inputs, outputs, x_stride, weight_stride, residual_stride;
  Epilogue epilogue;
  bool packed;
  bool paired;         // bf16: multiply pairs (vdpbf16ps); else widen, the same bits
  int64_t row_block;   // rows of one item, at most kRowBlock
  int64_t block_group; // blocks of `parts` panels of one item, at most kGroupPanels panels

  static constexpr int64_t kRowBlock = 192, kGroupPanels = 4;
  int parts() const { return epilogue == Epilogue::silu_mul ? 2 : 1; }
  int64_t words() const { return blocks_of(inputs, 4 / (int64_t)sizeof(T)); }
  int64_t blocks() const { return blocks_of(outputs, kPanel); }
  int64_t row_blocks() const { return blocks_of(rows, row_block); }
  int64_t groups() const { return blocks_of(blocks(), block_group); }
  int64_t items() const { return groups() * row_blocks(); }
};

KVKEYE_KERNEL(pack_weight, PackWeightParams)
KVKEYE_KERNEL(linear, LinearParams)

} // namespace kvkeye
