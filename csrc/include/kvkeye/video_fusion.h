// Fusion of overlapping tiles of frames on the CPU.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// A frame of a tile that lies on a frame of the video.
struct TileSource {
  int64_t offset; // elements from the tile frame's plane of channel 0 to the start of its branch
  float weight;
};

// out = latent + step * sum of weight * branch, or u + guidance (p - u) of two branches. Items: channels
// times frames.
template <class T> struct FuseTilesParams {
  const T* outputs;          // [branches, tiles, channels, length, plane]
  const TileSource* sources; // of frame f: [bounds[f], bounds[f + 1]), in the order of addition
  const int64_t* bounds;     // [frames + 1]
  const float* latent;       // [channels, frames, plane], or null for zeros
  float* out;                // [channels, frames, plane]
  int64_t branches, channels, frames, plane;
  int64_t channel_stride, branch_stride; // elements of outputs
  float guidance, step;
};

// Items: tiles times places in them.
template <class T> struct FuseTilesBackwardParams {
  const float* grad;     // [channels, frames, plane]
  const T* outputs;      // [branches, tiles, channels, length, plane]
  const int32_t* starts; // [tiles]
  const float* weights;  // [tiles, length]
  T* grad_outputs;       // as outputs
  float* grad_weights;   // [tiles, length]
  int64_t branches, tiles, channels, length, frames, plane;
  float guidance, step;
};

KVKEYE_KERNEL(fuse_tiles, FuseTilesParams)
KVKEYE_KERNEL(fuse_tiles_backward, FuseTilesBackwardParams)

} // namespace kvkeye
