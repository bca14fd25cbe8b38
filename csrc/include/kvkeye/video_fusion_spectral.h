// The Gaussian of spectral_blend on the CPU: separable, so one circulant matrix product per axis.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

static constexpr int64_t kStripColumns = 256; // columns of a volume whose frames are mixed together

// One volume. filter_planes: volume = rows and columns of low - high filtered; items are frames.
// filter_frames: out = high + frames of volume filtered, rest = low - out; items are strips.
template <class T> struct SpectralBlendParams {
  const T *low, *high;                               // [frames, height, width]; high null for zeros
  T *out, *rest;                                     // [frames, height, width]; rest may be null
  const float *over_time, *over_height, *over_width; // [n, n] symmetric; the last [width, padded]
  float* volume;                                     // [frames, height, padded]
  int64_t frames, height, width, padded;             // padded: width in whole vectors of 16
  float* scratch;                                    // spectral_scratch() floats, one per thread
};

static inline int64_t spectral_scratch(int64_t frames, int64_t height, int64_t padded) {
  const int64_t planes = 2 * height * padded, strip = frames * kStripColumns;
  return (planes > strip ? planes : strip) + 64;
}

KVKEYE_KERNEL(filter_planes, SpectralBlendParams)
KVKEYE_KERNEL(filter_frames, SpectralBlendParams)

} // namespace kvkeye
