// Discrete Fourier transforms of one length by mixed radices: what a kernel has to know of the length.
#pragma once

#include <cstdint>

namespace kvkeye {

inline constexpr int64_t kLargestRadix = 64; // a length with a larger prime factor has no plan
inline constexpr int kMostStages = 40;       // int64 holds no product of more factors 3 and 4

// Blocks of `length` rows, each made `radix` blocks.
struct FftStage {
  int64_t length;
  int radix;
  const float* twiddles; // [length / radix - 1, radix - 1, 2] cos and sin of -2 pi j k / length, both from 1
  const float* roots;    // [radix, 2] cos and sin of 2 pi k / radix
};

struct FftPlan {
  int64_t size;
  int stages;
  FftStage stage[kMostStages];
  const int64_t* place; // [size] the row in which decimation in frequency leaves a frequency
};

} // namespace kvkeye
