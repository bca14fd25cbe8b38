// Philox4x32-10 (Salmon et al. 2011): counter-based random numbers, the same on every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVKEYE_PHILOX static __host__ __device__ inline
#else
#define KVKEYE_PHILOX static inline __attribute__((always_inline))
#endif

namespace kvkeye {

// Kinds of draw, the third word of the counter.
enum class Draw : uint32_t { sample = 0, accept = 1 };

// Whether the draft number `sibling` at this position is accepted.
KVKEYE_PHILOX Draw accept_draw(int sibling) {
  return (Draw)((uint32_t)Draw::accept + ((uint32_t)sibling << 8));
}

struct PhiloxBlock {
  uint32_t word[4];
};

KVKEYE_PHILOX PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key_low, uint32_t key_high) {
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = (uint64_t)0xD2511F53u * c[0], second = (uint64_t)0xCD9E8D57u * c[2];
    c[0] = (uint32_t)(second >> 32) ^ c[1] ^ key_low;
    c[2] = (uint32_t)(first >> 32) ^ c[3] ^ key_high;
    c[1] = (uint32_t)second;
    c[3] = (uint32_t)first;
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// A number in [0, 1) with 53 random bits. Key = seed, counter = (position, kind of draw, sample index).
KVKEYE_PHILOX double philox_uniform(int64_t seed, int64_t position, Draw kind, int64_t sample_index) {
  const uint64_t key = (uint64_t)seed, at = (uint64_t)position;
  const PhiloxBlock counter{{(uint32_t)at, (uint32_t)(at >> 32), (uint32_t)kind, (uint32_t)sample_index}};
  const PhiloxBlock drawn = philox4x32(counter, (uint32_t)key, (uint32_t)(key >> 32));
  return (double)(((uint64_t)drawn.word[0] << 32 | drawn.word[1]) >> 11) * 0x1p-53;
}

} // namespace kvkeye
