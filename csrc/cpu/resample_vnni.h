// Both passes with vpdpbusd: four unsigned levels times four signed bytes, added to 32 bits.
//
// A weight is (high 2^8 + middle) 2^8 + low with signed bytes, so a sum is three such products, the upper
// ones shifted. It is exact: the 32 bits hold the whole sum, and what overflows in between comes back.
#pragma once

#include "resample_portable.h"

namespace kvkeye::KVKEYE_ISA {
namespace vnni {

// Digits by which weights are scaled up so that half a unit is a whole number of 2^16.
KVKEYE_INLINE int32_t lift_of(const ResampleAxis& axis) {
  return axis.precision < 17 ? 17 - axis.precision : 0;
}

// What the sum of the high bytes begins with.
KVKEYE_INLINE Vi half_unit(const ResampleAxis& axis) {
  return Vi{} + (1 << (axis.precision + lift_of(axis) - 17));
}

// Taps [4 group, 4 group + 4) of one output as a word per digit, high first; zero beyond the axis' taps.
KVKEYE_INLINE void group_words(const ResampleAxis& axis, int64_t output, int64_t group, int32_t* words) {
  uint32_t found[kDigits] = {};
  for (int64_t i = 0; i < kGroupTaps && group * kGroupTaps + i < axis.taps; ++i) {
    const int32_t weight = axis.weights[output * axis.taps + group * kGroupTaps + i] * (1 << lift_of(axis));
    const int32_t low = (int8_t)weight, rest = (weight - low) >> 8;
    const int32_t middle = (int8_t)rest, high = (rest - middle) >> 8;
    found[0] |= (uint32_t)(uint8_t)high << (8 * i);
    found[1] |= (uint32_t)(uint8_t)middle << (8 * i);
    found[2] |= (uint32_t)(uint8_t)low << (8 * i);
  }
  std::memcpy(words, found, sizeof found);
}

KVKEYE_INLINE void prepare_words(const ResampleAxis& axis, int64_t output, RowTaps& taps) {
  for (int64_t group = 0; group < taps.groups; ++group)
    group_words(axis, output, group, taps.words + group * kDigits);
}

// Fills one group of taps of the vector that begins at `sample`: where its bytes come from, and its weights.
KVKEYE_INLINE void fill_block(const TileColumns& tile, int64_t sample, int64_t group, TapBlock& block) {
  block.offset = tile.offset[sample / 3] + (int32_t)(3 * kGroupTaps * group);
  block.pieces = 1;
  std::memset(block.mask, 0, sizeof block.mask);
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t lane = (sample + i) / 3, channel = (sample + i) % 3;
    int32_t words[kDigits];
    group_words(*tile.axis, tile.column[lane], group, words);
    for (int64_t digit = 0; digit < kDigits; ++digit)
      std::memcpy(block.weights[digit] + kGroupTaps * i, words + digit, sizeof words[digit]);
    for (int64_t tap = 0; tap < kGroupTaps; ++tap) {
      const int64_t from = tile.offset[lane] - tile.offset[sample / 3] + 3 * tap + channel;
      block.index[kGroupTaps * i + tap] = (uint8_t)(from % 64);
      block.mask[from / 64] |= (uint64_t)1 << (kGroupTaps * i + tap);
      block.pieces = from / 64 + 1 > block.pieces ? (int32_t)(from / 64 + 1) : block.pieces;
    }
  }
}

// Whether the columns of one vector lie so far apart that kPieces loads do not reach them all.
KVKEYE_INLINE bool too_far(const TileColumns& tile) {
  int64_t farthest = 0;
  for (int64_t sample = 0; sample < tile.cells * 3 * kCellColumns; sample += kSamples) {
    const int64_t apart = tile.offset[(sample + kSamples - 1) / 3] - tile.offset[sample / 3];
    farthest = apart > farthest ? apart : farthest;
  }
  return farthest + 3 * kGroupTaps > 64 * kPieces;
}

KVKEYE_INLINE void prepare_weights(TileColumns& tile) {
  tile.far = too_far(tile);
  if (tile.far)
    return;
  const int64_t vectors = tile.cells * kCellVectors;
  int32_t filled = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    int64_t most = 1;
    for (int64_t i = 0; i < kSamples; ++i) {
      const int64_t groups = groups_of_taps(tile.axis->count[tile.column[(v * kSamples + i) / 3]]);
      most = groups > most ? groups : most;
    }
    tile.first_block[v] = filled;
    for (int64_t group = 0; group < most; ++group)
      fill_block(tile, v * kSamples, group, tile.blocks[filled++]);
  }
  tile.first_block[vectors] = filled;
}

KVKEYE_INLINE __m512i load_bytes(const void* source) {
  return _mm512_loadu_si512(source);
}

KVKEYE_INLINE __m512i permute(__m512i order, __m512i bytes) {
  return _mm512_maskz_permutexvar_epi8(~(__mmask64)0, order, bytes);
}

KVKEYE_INLINE Vi dot(Vi sum, __m512i levels, __m512i weights) {
  return (Vi)_mm512_dpbusd_epi32((__m512i)sum, levels, weights);
}

// Four taps of sixteen samples, for each row.
template <int kRows>
KVKEYE_INLINE void gather_taps(const TapBlock& block, const uint8_t* const* rows, __m512i* taps) {
  const __m512i index = load_bytes(block.index);
  for (int r = 0; r < kRows; ++r)
    taps[r] = permute(index, load_bytes(rows[r] + block.offset));
  for (int32_t piece = 1; piece < block.pieces; ++piece)
    for (int r = 0; r < kRows; ++r)
      taps[r] = _mm512_mask_permutexvar_epi8(taps[r], block.mask[piece], index,
                                             load_bytes(rows[r] + block.offset + 64 * piece));
}

// The sums of sixteen samples, for each row.
template <int kRows>
KVKEYE_INLINE void horizontal_sums(const TapBlock* block, const TapBlock* end, Vi half,
                                   const uint8_t* const* rows, Vi* sums) {
  Vi middle[kRows], low[kRows];
  for (int r = 0; r < kRows; ++r) {
    sums[r] = half;
    middle[r] = low[r] = Vi{};
  }
  do {
    __m512i taps[kRows];
    gather_taps<kRows>(*block, rows, taps);
    for (int r = 0; r < kRows; ++r) {
      sums[r] = dot(sums[r], taps[r], load_bytes(block->weights[0]));
      middle[r] = dot(middle[r], taps[r], load_bytes(block->weights[1]));
      low[r] = dot(low[r], taps[r], load_bytes(block->weights[2]));
    }
  } while (++block != end);
  for (int r = 0; r < kRows; ++r)
    sums[r] = (((sums[r] << 8) + middle[r]) << 8) + low[r];
}

// 32-bit sums of four vectors to unsigned bytes; within a lane the vectors follow one another.
KVKEYE_INLINE __m512i clipped(Vi a, Vi b, Vi c, Vi d) {
  return _mm512_packus_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b),
                             _mm512_packs_epi32((__m512i)c, (__m512i)d));
}

// Bytes [48] in the order of `planes` to a cell's three planes.
KVKEYE_INLINE void store_cell(uint8_t* line, int64_t cell, __m512i planes) {
  typedef int32_t V4i __attribute__((vector_size(16)));
  const V4i red = __builtin_shufflevector((Vi)planes, (Vi)planes, 0, 1, 2, 3);
  const V4i green = __builtin_shufflevector((Vi)planes, (Vi)planes, 4, 5, 6, 7);
  const V4i blue = __builtin_shufflevector((Vi)planes, (Vi)planes, 8, 9, 10, 11);
  uint8_t* target = line + cell * kCellColumns;
  std::memcpy(target, &red, sizeof red);
  std::memcpy(target + kTileColumns, &green, sizeof green);
  std::memcpy(target + 2 * kTileColumns, &blue, sizeof blue);
}

// Where the sample (column, channel) lies after `clipped`: vector s / 16, lane s % 16 / 4, word s % 4.
struct PlaneOrder {
  uint8_t clipped[64], packed[64];
  uint8_t pixels[64]; // the way back
};

constexpr PlaneOrder plane_order() {
  PlaneOrder order{};
  for (int channel = 0; channel < 3; ++channel)
    for (int column = 0; column < 16; ++column) {
      const int sample = 3 * column + channel;
      order.clipped[channel * 16 + column] = (uint8_t)(sample % 16 / 4 * 16 + sample / 16 * 4 + sample % 4);
      order.packed[channel * 16 + column] = (uint8_t)sample;
      order.pixels[sample] = (uint8_t)(channel * 16 + column);
    }
  return order;
}

static constexpr PlaneOrder kPlaneOrder = plane_order();

template <int kRows>
KVKEYE_INLINE void horizontal_rows(const TileColumns& tile, const uint8_t* const* rows,
                                   uint8_t* const* lines) {
  const __m512i order = load_bytes(kPlaneOrder.clipped);
  const Vi half = half_unit(*tile.axis), shift = Vi{} + (tile.axis->precision + lift_of(*tile.axis));
  for (int64_t cell = 0; cell < tile.cells; ++cell) {
    const int32_t* first = tile.first_block + cell * kCellVectors;
    for (int r = 0; r < kRows; ++r)
      __builtin_prefetch(rows[r] + tile.offset[cell * kCellColumns] + kRowsTogether * tile.row_stride);
    Vi a[kRows], b[kRows], c[kRows];
    horizontal_sums<kRows>(tile.blocks + first[0], tile.blocks + first[1], half, rows, a);
    horizontal_sums<kRows>(tile.blocks + first[1], tile.blocks + first[2], half, rows, b);
    horizontal_sums<kRows>(tile.blocks + first[2], tile.blocks + first[3], half, rows, c);
    for (int r = 0; r < kRows; ++r)
      store_cell(lines[r], cell, permute(order, clipped(a[r] >> shift, b[r] >> shift, c[r] >> shift, Vi{})));
  }
}

// Resamples `count` rows into as many lines.
KVKEYE_INLINE void horizontal_lines(const TileColumns& tile, const uint8_t* const* rows,
                                    uint8_t* const* lines, int64_t count) {
  if (tile.far)
    return portable::horizontal_lines(tile, rows, lines, count);
  if (count == kRowsTogether)
    return horizontal_rows<kRowsTogether>(tile, rows, lines);
  for (int64_t i = 0; i < count; ++i)
    horizontal_rows<1>(tile, rows + i, lines + i);
}

// The row as it is.
KVKEYE_INLINE void copy_line(const TileColumns& tile, const uint8_t* row, uint8_t* line) {
  const __m512i order = load_bytes(kPlaneOrder.packed);
  for (int64_t cell = 0; cell < tile.cells; ++cell)
    store_cell(line, cell, permute(order, load_bytes(row + tile.offset[cell * kCellColumns])));
}

// One cell of a line to pixels.
KVKEYE_INLINE void store_pixels(const uint8_t* line, int64_t cell, uint8_t* target, int64_t columns) {
  uint8_t planes[64];
  for (int64_t channel = 0; channel < 3; ++channel)
    std::memcpy(planes + 16 * channel, line + channel * kTileColumns + cell * kCellColumns, 16);
  const __m512i pixels = permute(load_bytes(kPlaneOrder.pixels), load_bytes(planes));
  _mm512_mask_storeu_epi8(target, ((__mmask64)1 << (3 * columns)) - 1, pixels);
}

// 64 columns of four lines, the four levels of a column side by side: columns 4 i to 4 i + 3 of each lane in
// bytes[i].
KVKEYE_INLINE void four_rows(const uint8_t* const* lines, int64_t x, __m512i bytes[4]) {
  const __m512i a = load_bytes(lines[0] + x), b = load_bytes(lines[1] + x);
  const __m512i c = load_bytes(lines[2] + x), d = load_bytes(lines[3] + x);
  const __m512i low[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)};
  const __m512i high[2] = {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)};
  bytes[0] = _mm512_unpacklo_epi16(low[0], low[1]);
  bytes[1] = _mm512_unpackhi_epi16(low[0], low[1]);
  bytes[2] = _mm512_unpacklo_epi16(high[0], high[1]);
  bytes[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

// 64 columns, taps in kGroups groups: digit by digit, the sum shifted in between.
template <int kGroups>
KVKEYE_INLINE __m512i vertical_short(const RowTaps& taps, int64_t x, Vi half, Vi shift) {
  __m512i bytes[kGroups][4];
  for (int group = 0; group < kGroups; ++group)
    four_rows(taps.lines + group * kGroupTaps, x, bytes[group]);
  Vi sums[4] = {half, half, half, half};
  for (int digit = 0; digit < kDigits; ++digit)
    for (int i = 0; i < 4; ++i) {
      sums[i] = digit == 0 ? sums[i] : sums[i] << 8;
      for (int group = 0; group < kGroups; ++group)
        sums[i] = dot(sums[i], bytes[group][i], _mm512_set1_epi32(taps.words[group * kDigits + digit]));
    }
  return clipped(sums[0] >> shift, sums[1] >> shift, sums[2] >> shift, sums[3] >> shift);
}

// 64 columns, any number of taps: the digits' sums side by side.
KVKEYE_INLINE __m512i vertical_long(const RowTaps& taps, int64_t x, Vi half, Vi shift) {
  Vi sums[4] = {half, half, half, half}, middle[4] = {}, low[4] = {};
  for (int64_t group = 0; group < taps.groups; ++group) {
    const int32_t* words = taps.words + group * kDigits;
    __m512i bytes[4];
    four_rows(taps.lines + group * kGroupTaps, x, bytes);
    for (int i = 0; i < 4; ++i) {
      sums[i] = dot(sums[i], bytes[i], _mm512_set1_epi32(words[0]));
      middle[i] = dot(middle[i], bytes[i], _mm512_set1_epi32(words[1]));
      low[i] = dot(low[i], bytes[i], _mm512_set1_epi32(words[2]));
    }
  }
  for (int i = 0; i < 4; ++i)
    sums[i] = ((((sums[i] << 8) + middle[i]) << 8) + low[i]) >> shift;
  return clipped(sums[0], sums[1], sums[2], sums[3]);
}

template <class Columns> KVKEYE_INLINE void for_columns(int64_t cells, uint8_t* line, Columns columns) {
  for (int64_t channel = 0; channel < 3; ++channel)
    for (int64_t x = 0; x < cells * kCellColumns; x += 64)
      _mm512_storeu_si512(line + channel * kTileColumns + x, columns(channel * kTileColumns + x));
}

KVKEYE_INLINE void vertical_line(const ResampleAxis& axis, const RowTaps& taps, int64_t cells,
                                 uint8_t* line) {
  const Vi half = half_unit(axis), shift = Vi{} + (axis.precision + lift_of(axis));
  if (taps.groups == 1)
    for_columns(cells, line,
                [&](int64_t x) KVKEYE_LAMBDA { return vertical_short<1>(taps, x, half, shift); });
  else if (taps.groups == 2)
    for_columns(cells, line,
                [&](int64_t x) KVKEYE_LAMBDA { return vertical_short<2>(taps, x, half, shift); });
  else
    for_columns(cells, line, [&](int64_t x) KVKEYE_LAMBDA { return vertical_long(taps, x, half, shift); });
}

} // namespace vnni
} // namespace kvkeye::KVKEYE_ISA
