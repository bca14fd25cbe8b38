// pack_patches on the GPU: one launch for pictures of any sizes. What the kernel reads is one piece of
// memory, the plan: pictures, weight tables, values of the levels (csrc/torch/cuda_pack_plan.h makes it).
#pragma once

#include "kvkeye/common/types.h"

#include <cstdint>

namespace kvkeye {

constexpr int64_t kCudaPatch = 14;
constexpr int64_t kCudaTilePatches =
    8; // a block of threads makes up to so many patches of one row of patches

// One axis in the tables: first [out], count [out], weights [taps, out]; see ResampleAxis.
struct PackCudaAxis {
  int64_t start; // in int32 words
  int32_t in, out, taps, precision;
};

struct PackCudaImage {
  const uint8_t* pixels; // [rows.in, columns.in, 3], rows row_stride bytes apart
  int64_t row_stride;
  int64_t first_patch, first_tile;     // its first row of out, its first block of threads
  int32_t patch_columns, tile_columns; // patches, and tiles, beside each other
  PackCudaAxis rows, columns;
};

template <class T> struct PackCudaParams {
  const PackCudaImage* images; // [num_images]
  const float* levels;         // [3, 256], the value of each level, rounded to T
  const int32_t* tables;
  T* out; // [patches, 3, kCudaPatch, kCudaPatch], aligned to 16 bytes
  int64_t num_images, tiles;
};

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. T is float or bf16.
template <class T> int pack_patches(const PackCudaParams<T>& params, void* stream);

// Whether the stream's work goes into a graph: a replay would read the plan after its memory is gone.
bool is_capturing(void* stream);
} // namespace cuda

} // namespace kvkeye
