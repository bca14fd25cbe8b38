// Frames of a clip compared by their colours.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// RGB to HSV in patches; items are rows of pixels.
struct HsvPatchesParams {
  const uint8_t* pixels; // [rows, width, 3], rows row_stride bytes apart
  uint8_t* out;          // [rows / patch * width / patch, 3, patch, patch]
  int64_t width, row_stride, patch;
};

// Products of rows; items are rows.
struct PatchProductsParams {
  const uint8_t *a, *b; // [n, size], rows a_stride and b_stride bytes apart
  int64_t* out;         // [n]
  int64_t size, a_stride, b_stride;
};

KVKEYE_UNTYPED_KERNEL(hsv_patches, HsvPatchesParams)
KVKEYE_UNTYPED_KERNEL(patch_products, PatchProductsParams)

} // namespace kvkeye
