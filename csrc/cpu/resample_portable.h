// Both passes with 32-bit products: a pixel's channels side by side in the horizontal one, columns in the
// other.
#pragma once

#include "resample_tile.h"

namespace kvkeye::KVKEYE_ISA {
namespace portable {

typedef int32_t V4i __attribute__((vector_size(16)));

// The levels of a pixel, and the byte after it.
KVKEYE_INLINE V4i load_pixel(const uint8_t* source) {
#if defined(__SSE4_1__)
  return (V4i)_mm_cvtepu8_epi32(_mm_loadu_si32(source));
#else
  return V4i{source[0], source[1], source[2], source[3]};
#endif
}

KVKEYE_INLINE uint8_t clip8(int32_t value) {
  return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

KVKEYE_INLINE void prepare_weights(TileColumns&) {}
KVKEYE_INLINE void prepare_words(const ResampleAxis&, int64_t, RowTaps&) {}

KVKEYE_INLINE void horizontal_line(const TileColumns& tile, const uint8_t* row, uint8_t* line) {
  const ResampleAxis& axis = *tile.axis;
  for (int64_t lane = 0; lane < tile.cells * kCellColumns; ++lane) {
    const int64_t column = tile.column[lane];
    const int32_t* weights = axis.weights + column * axis.taps;
    const uint8_t* pixel = row + tile.offset[lane];
    V4i sum = V4i{} + (1 << (axis.precision - 1));
    for (int64_t i = 0; i < axis.count[column]; ++i)
      sum += load_pixel(pixel + 3 * i) * weights[i];
    for (int64_t channel = 0; channel < 3; ++channel)
      line[channel * kTileColumns + lane] = clip8(sum[channel] >> axis.precision);
  }
}

// Resamples `count` rows into as many lines.
KVKEYE_INLINE void horizontal_lines(const TileColumns& tile, const uint8_t* const* rows,
                                    uint8_t* const* lines, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    horizontal_line(tile, rows[i], lines[i]);
}

// The row as it is.
KVKEYE_INLINE void copy_line(const TileColumns& tile, const uint8_t* row, uint8_t* line) {
  for (int64_t lane = 0; lane < tile.cells * kCellColumns; ++lane)
    for (int64_t channel = 0; channel < 3; ++channel)
      line[channel * kTileColumns + lane] = row[tile.offset[lane] + channel];
}

// One cell of a line to pixels.
KVKEYE_INLINE void store_pixels(const uint8_t* line, int64_t cell, uint8_t* target, int64_t columns) {
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t channel = 0; channel < 3; ++channel)
      target[3 * i + channel] = line[channel * kTileColumns + cell * kCellColumns + i];
}

#if !defined(__AVX512VBMI__)

KVKEYE_INLINE void store_clipped(uint8_t* target, Vi value) {
#if defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)value);
  const __m128i words = _mm_packs_epi32(low, _mm256_extracti128_si256((__m256i)value, 1));
  _mm_storel_epi64((__m128i*)target, _mm_packus_epi16(words, words));
#elif defined(__SSE4_1__)
  const __m128i words = _mm_packs_epi32((__m128i)value, (__m128i)value);
  _mm_storeu_si32(target, _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i)
    target[i] = clip8(value[i]);
#endif
}

KVKEYE_INLINE void vertical_line(const ResampleAxis& axis, const RowTaps& taps, int64_t cells,
                                 uint8_t* line) {
  for (int64_t channel = 0; channel < 3; ++channel)
    for (int64_t x = channel * kTileColumns; x < channel * kTileColumns + cells * kCellColumns; x += kLanes) {
      Vi sum = Vi{} + (1 << (axis.precision - 1));
      for (int64_t i = 0; i < taps.count; ++i)
        sum += load_levels(taps.lines[i] + x) * taps.weights[i];
      store_clipped(line + x, sum >> axis.precision);
    }
}

#endif

} // namespace portable
} // namespace kvkeye::KVKEYE_ISA
