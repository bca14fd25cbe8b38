// The horizontal pass with vpmaddwd: two taps of a channel in one 32-bit sum, four taps per vector.
//
// A weight is high 2^12 + low, each in 16 bits; the whole sum fits in 32.
#pragma once

#include "resample_portable.h"

namespace kvkeye::KVKEYE_ISA {
namespace avx2_pairs {

using portable::copy_line;
using portable::prepare_words;
using portable::store_pixels;
using portable::vertical_line;

static constexpr int kLowBits = 12;

KVKEYE_INLINE void prepare_weights(TileColumns& tile) {
  const ResampleAxis& axis = *tile.axis;
  tile.groups = groups_of_taps(axis.taps);
  std::memset(tile.pairs, 0, tile.cells * kCellColumns * tile.groups * sizeof(TapPairs));
  for (int64_t lane = 0; lane < tile.cells * kCellColumns; ++lane)
    for (int64_t tap = 0; tap < axis.count[tile.column[lane]]; ++tap) {
      TapPairs& pairs = tile.pairs[lane * tile.groups + tap / kGroupTaps];
      const int32_t weight = axis.weights[tile.column[lane] * axis.taps + tap];
      const int32_t high = (weight + (1 << (kLowBits - 1))) >> kLowBits;
      for (int64_t channel = 0; channel < 3; ++channel) {
        const int64_t at = tap % kGroupTaps / 2 * 8 + channel * 2 + tap % 2;
        pairs.high[at] = (int16_t)high;
        pairs.low[at] = (int16_t)(weight - high * (1 << kLowBits));
      }
    }
}

// The sums of one column as words (R, G, B, 0).
KVKEYE_INLINE __m128i column_sums(const TileColumns& tile, const uint8_t* row, int64_t lane) {
  const __m256i spread = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1, //
                                          6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const TapPairs* pairs = tile.pairs + lane * tile.groups;
  const uint8_t* pixel = row + tile.offset[lane];
  __m256i high = _mm256_setzero_si256(), low = high;
  for (int64_t tap = 0; tap < tile.axis->count[tile.column[lane]]; tap += kGroupTaps, ++pairs) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(pixel + 3 * tap));
    const __m256i levels = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), spread);
    high = _mm256_add_epi32(high, _mm256_madd_epi16(levels, _mm256_loadu_si256((const __m256i*)pairs->high)));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(levels, _mm256_loadu_si256((const __m256i*)pairs->low)));
  }
  const __m256i sums = _mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low);
  return _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
}

KVKEYE_INLINE void horizontal_line(const TileColumns& tile, const uint8_t* row, uint8_t* line) {
  const __m128i half = _mm_set1_epi32(1 << (tile.axis->precision - 1));
  const __m128i shift = _mm_cvtsi32_si128(tile.axis->precision);
  const __m128i by_channel = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t lane = 0; lane < tile.cells * kCellColumns; lane += 4) {
    const auto column = [&](int64_t i) KVKEYE_LAMBDA {
      return _mm_sra_epi32(_mm_add_epi32(column_sums(tile, row, lane + i), half), shift);
    };
    const __m128i left = _mm_packs_epi32(column(0), column(1));
    const __m128i right = _mm_packs_epi32(column(2), column(3));
    const __m128i planes = _mm_shuffle_epi8(_mm_packus_epi16(left, right), by_channel);
    const int32_t red = _mm_extract_epi32(planes, 0), green = _mm_extract_epi32(planes, 1);
    const int32_t blue = _mm_extract_epi32(planes, 2);
    std::memcpy(line + lane, &red, sizeof red);
    std::memcpy(line + kTileColumns + lane, &green, sizeof green);
    std::memcpy(line + 2 * kTileColumns + lane, &blue, sizeof blue);
  }
}

// Resamples `count` rows into as many lines.
KVKEYE_INLINE void horizontal_lines(const TileColumns& tile, const uint8_t* const* rows,
                                    uint8_t* const* lines, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    horizontal_line(tile, rows[i], lines[i]);
}

} // namespace avx2_pairs
} // namespace kvkeye::KVKEYE_ISA
