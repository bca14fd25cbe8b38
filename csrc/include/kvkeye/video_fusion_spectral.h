// spectral_blend on the CPU: transform, gain per frequency, transform back.
#pragma once

#include "kvkeye/common/kernel.h"
#include "kvkeye/fft.h"

namespace kvkeye {

static constexpr int64_t kWidestVector = 16; // floats

// One volume of real numbers: half its spectrum in time says all. Two columns of pixels are one complex
// column in time; they are of one volume, so that no volume shows in another's rounding.
//   spectrum_of_frames: low - high to frequencies of time; items are pairs of strips
//   filter_spectrum: each frequency's plane to frequencies of space, times gain, and back; items are planes
//   frames_of_spectrum: out = high + the filtered frames, rest = low - them; items are pairs of strips
template <class T> struct SpectralBlendParams {
  const T *low, *high; // [frames, plane]; high null for zeros
  T *out, *rest;       // [frames, plane]; rest may be null
  float* spectrum;     // [frames / 2 + 1, 2 parts, padded]
  const float* gain;   // [frames / 2 + 1, height, pitch], in the order of the transforms; 0 behind a row
  const FftPlan *time, *rows, *columns; // of sizes frames, height, width
  int64_t plane, padded;                // pixels; in whole pairs of strips
  int64_t strip;                        // pixels of a strip, whole vectors
  int64_t pitch;                        // a row of a plane, padded
  float* scratch;                       // spectral_scratch() floats, one per thread
};

// An odd number of widest vectors: rows of any width then spread over the cache.
static inline int64_t spectral_pitch(int64_t width) {
  return ((width + kWidestVector - 1) / kWidestVector | 1) * kWidestVector;
}

// A pair of strips is to lie in the nearest cache for all frames.
static inline int64_t spectral_strip(int64_t frames) {
  constexpr int64_t kFloats = 2048;
  const int64_t vectors = kFloats / kWidestVector / frames;
  return (vectors < 1 ? 1 : vectors > 4 ? 4 : vectors) * kWidestVector;
}

static inline int64_t spectral_scratch(int64_t frames, int64_t height, int64_t width) {
  const int64_t strips = 2 * frames * spectral_strip(frames);
  const int64_t planes = 2 * (height * spectral_pitch(width) + width * kWidestVector);
  return (strips > planes ? strips : planes) + 16;
}

KVKEYE_KERNEL(spectrum_of_frames, SpectralBlendParams)
KVKEYE_KERNEL(filter_spectrum, SpectralBlendParams)
KVKEYE_KERNEL(frames_of_spectrum, SpectralBlendParams)

} // namespace kvkeye
