// Storage types shared by CPU and CUDA kernels. No framework, no standard containers.
#pragma once

#include <cstdint>

namespace kvkeye {

// The upper half of an fp32; arithmetic happens in fp32 after widening.
struct bf16 {
  uint16_t bits;
};

} // namespace kvkeye
