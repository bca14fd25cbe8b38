// Rows and columns cut into blocks of a fixed size: units of work that no number of threads can move.
#pragma once

#include <cstdint>

namespace kvkeye {

// Columns per item of an elementwise kernel, or of a sum over rows.
inline constexpr int64_t kElementBlock = 1024;
inline constexpr int64_t kColumnBlock = 64;

constexpr int64_t blocks_of(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

} // namespace kvkeye
