// Fusion of overlapping tiles on the GPU.
#pragma once

#include "kvkeye/common/types.h"

#include <cstdint>

namespace kvkeye {

static constexpr int64_t kCudaTileFrames = 256; // of the longest tile

// As FuseTilesParams, with the starts on the device: nothing waits for their values.
template <class T> struct FuseTilesCudaParams {
  const T* outputs;      // [branches, tiles, channels, length, plane]
  const int32_t* starts; // [tiles], modulo frames, all different
  const float* weights;  // [tiles, length]
  const float* latent;   // [channels, frames, plane], or null for zeros
  float* out;            // [channels, frames, plane]
  int64_t branches, tiles, channels, length, frames, plane;
  float guidance, step;
};

namespace cuda {
// Pointers are device pointers, `stream` is a cudaStream_t; returns a cudaError_t. T is float or bf16.
template <class T> int fuse_tiles(const FuseTilesCudaParams<T>& params, void* stream);
} // namespace cuda

} // namespace kvkeye
