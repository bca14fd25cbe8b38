// Patches of the vision tower. One call of a kernel handles one picture of a packed batch.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// The position table resized to a grid: bilinear, half-pixel centres, no antialiasing. Items are output rows.
template <class T> struct InterpolatePositionParams {
  const T* table; // [side, side, dim]
  T* out;         // [frames height width, dim]
  int64_t side, dim, height, width;
};

// Items are blocks of kColumnBlock columns; each walks the pictures' rows in order and adds to the gradient.
template <class T> struct InterpolatePositionBackwardParams {
  const T* grad;     // [frames height width, dim]
  float* grad_table; // [side, side, dim], added to
  int64_t side, dim, frames, height, width;
};

// Rows of each merge x merge window side by side, or back. Items are windows.
struct MergePatchesParams {
  const char* source; // rows [frames height width] source_stride bytes apart, or windows [frames height width
                      // / merge^2]
  char* target;       // the other of the two
  int64_t height, width, merge, row_bytes, source_stride;
  bool split; // windows back to rows: the gradient
};

KVKEYE_KERNEL(interpolate_position, InterpolatePositionParams)
KVKEYE_KERNEL(interpolate_position_backward, InterpolatePositionBackwardParams)
KVKEYE_UNTYPED_KERNEL(merge_patches, MergePatchesParams)

} // namespace kvkeye
