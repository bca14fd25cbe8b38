// What both versions of the passes share: the columns of a tile, the taps of a row.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/vision_pack.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// The columns of one tile. Lanes that pad a cell repeat the last column of their patch.
struct TileColumns {
  const ResampleAxis* axis;
  int64_t cells;
  int64_t row_stride;                    // input bytes from row to row
  int64_t low, reach;                    // input bytes [low, reach) of a row may be read
  int32_t offset[kTileColumns];          // of the first tap, in bytes from the start of a row
  int32_t column[kTileColumns];          // output column
  bool far;                              // with AVX-512: the columns lie too far apart for the blocks
  TapPairs* pairs;                       // with AVX2: the weights, column after column
  int64_t groups;                        // with as many of them for each
  TapBlock* blocks;                      // with AVX-512: the weights in the order of their use,
  int32_t first_block[kTileVectors + 1]; // those of vector v are [first_block[v], first_block[v + 1])
};

// The lines that make one output row, and their weights; whole groups of lines, the last one repeated.
struct RowTaps {
  int64_t count, groups;
  const int32_t* weights; // [count]
  const uint8_t** lines;  // [groups * kGroupTaps]
  int32_t* words;         // [groups, kDigits], with AVX-512
};

// kLanes levels as integers. The compiler's own conversion goes lane by lane.
KVKEYE_INLINE Vi load_levels(const uint8_t* source) {
#if defined(__AVX512F__)
  return (Vi)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)source));
#elif defined(__AVX2__)
  return (Vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)source));
#elif defined(__SSE4_1__)
  return (Vi)_mm_cvtepu8_epi32(_mm_loadu_si32(source));
#else
  return Vi{source[0], source[1], source[2], source[3]};
#endif
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
