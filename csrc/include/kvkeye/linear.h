// Linear layers. Items are blocks of rows times groups of panels of outputs.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/kernel.h"

namespace kvkeye {

inline constexpr int kPanel = 32; // outputs side by side

// Inputs of one partial sum. Of int8, whose sums are exact, as many as give a chunk of the same bytes as
// bf16.
template <class T> inline constexpr int kInputChunk = sizeof(T) == 1 ? 256 : 128;

// The index-th of `count` parts of [0, size), whose sizes differ by one at most.
struct Part {
  int64_t first, count;
  __attribute__((always_inline)) static Part of(int64_t index, int64_t count, int64_t size) {
    const int64_t first = size * index / count;
    return {first, size * (index + 1) / count - first};
  }
};

// A packed weight is a row of panels of kPanel outputs, [words, kPanel] of 4 bytes each: an fp32, two bf16 or
// four int8 that are neighbours in k. Missing outputs and inputs are zero. With two parts (gate and up),
// panels of the first and of the second half of the rows alternate.
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

// How a product is cut into items: bands of outputs, in each blocks of rows, for each groups of panels. An
// item's neighbour in order shares its rows, a thread's items share a band.
struct LinearCut {
  int64_t rows, inputs, outputs;
  Epilogue epilogue;
  int64_t bands, row_blocks, groups; // groups in one band

  // Rows and panels of one item at most; blocks of rows begin at multiples of kRowUnit.
  static constexpr int64_t kRowBlock = 96, kGroupPanels = 32, kRowUnit = 12;

  int parts() const { return epilogue == Epilogue::silu_mul ? 2 : 1; }
  int64_t blocks() const { return blocks_of(outputs, kPanel); }
  int64_t items() const { return bands * row_blocks * groups; }

  __attribute__((always_inline)) Part rows_of(int64_t item) const {
    const Part units = Part::of(item / groups % row_blocks, row_blocks, blocks_of(rows, kRowUnit));
    const int64_t first = units.first * kRowUnit, left = rows - first;
    return {first, units.count * kRowUnit < left ? units.count * kRowUnit : left};
  }
  __attribute__((always_inline)) Part blocks_of_item(int64_t item) const {
    const Part band = Part::of(item / groups / row_blocks, bands, blocks());
    const Part group = Part::of(item % groups, groups, band.count);
    return {band.first + group.first, group.count};
  }
};

// y = epilogue(x W^T + b). An element: the products of kInputChunk inputs enter one fp32 sum in a fixed
// order, these sums are added in the order of k, then comes the bias. Rows beside it, its place in a tile and
// the form of the weight change nothing.
template <class T> struct LinearParams : LinearCut {
  using Input = T;
  using Output = T;
  const T* x;        // [rows, inputs], rows x_stride apart
  const T* weight;   // packed, or [parts * outputs, inputs], rows weight_stride apart
  const T* bias;     // [outputs] or null; one part only
  const T* residual; // add: [rows, outputs], rows residual_stride apart
  T* y;              // [rows, outputs]
  int64_t x_stride, weight_stride, residual_stride;
  bool packed;
  bool paired; // bf16: multiply pairs (vdpbf16ps); else widen, the same bits
};

KVKEYE_KERNEL(pack_weight, PackWeightParams)
KVKEYE_KERNEL(linear, LinearParams)

} // namespace kvkeye
