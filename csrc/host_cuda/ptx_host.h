// The functions of csrc/cuda/ptx.h for the host: the last lane of a warp to arrive computes for all.
#pragma once

#include "grid.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace kvkeye::cuda {

#define KVKEYE_HERE host_cuda::Line here = {__builtin_FILE(), __builtin_LINE()}

inline void copy_async(void* shared, const void* global, bool valid, KVKEYE_HERE) {
  host_cuda::copy_async(shared, global, valid, here);
}
inline void commit_copies() {
  host_cuda::commit_copies();
}
template <int GroupsLeft> void wait_copies() {
  host_cuda::wait_copies(GroupsLeft);
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

inline uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float first, float second) {
  return round_to_bf16(first) | (uint32_t)round_to_bf16(second) << 16;
}

namespace fragments {

struct alignas(16) Row {
  uint16_t values[8];
};

// One lane's part in ldmatrix.
struct Load {
  Row row;
  uint32_t found[4];
};

inline uint32_t pair(uint16_t first, uint16_t second) {
  return first | (uint32_t)second << 16;
}

template <bool Transposed> void join_loads(void* const* lanes) {
  const auto value = [&](int matrix, int row, int column) {
    return static_cast<const Load*>(lanes[8 * matrix + row])->row.values[column];
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int g = lane / 4, c = 2 * (lane % 4);
      static_cast<Load*>(lanes[lane])->found[matrix] =
          Transposed ? pair(value(matrix, c, g), value(matrix, c + 1, g))
                     : pair(value(matrix, g, c), value(matrix, g, c + 1));
    }
}

template <bool Transposed>
void load(const char* what, uint32_t (&found)[4], const void* row, host_cuda::Line here) {
  Load mine{*static_cast<const Row*>(row), {}};
  host_cuda::join_warp(what, &mine, &join_loads<Transposed>, here);
  std::memcpy(found, mine.found, sizeof found);
}

// One lane's part in mma.
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

inline float half_of(uint32_t word, int which) {
  const uint32_t bits = which == 0 ? word << 16 : word & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void join_products(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& part = *static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j)
        a[g + 8 * (i % 2)][c + j + 8 * (i / 2)] = half_of(part.a[i], j);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        b[c + j + 8 * i][g] = half_of(part.b[i], j);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& part = *static_cast<const Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      float sum = part.d[i];
      for (int k = 0; k < 16; ++k)
        sum += a[row][k] * b[k][column];
      part.d[i] = sum;
    }
  }
}

} // namespace fragments

inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  using fragments::half_of;
  return pack_bf16(half_of(a, 0) * half_of(b, 0), half_of(a, 1) * half_of(b, 1));
}

inline void load_matrices(uint32_t (&found)[4], const void* row, KVKEYE_HERE) {
  fragments::load<false>("ldmatrix", found, row, here);
}
inline void load_matrices_transposed(uint32_t (&found)[4], const void* row, KVKEYE_HERE) {
  fragments::load<true>("ldmatrix.trans", found, row, here);
}
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, KVKEYE_HERE) {
  fragments::Product mine{d, a, {b0, b1}};
  host_cuda::join_warp("mma.sync", &mine, &fragments::join_products, here);
}

#undef KVKEYE_HERE

} // namespace kvkeye::cuda
