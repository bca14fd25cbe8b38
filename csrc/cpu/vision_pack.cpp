// Pictures to rows of patches: the walk down a tile, and where a finished line goes.
#include "kvkeye/vision_pack.h"
#include "kvkeye/common/simd.h"
#include "resample_rows.h"

#include <cstring>

namespace kvkeye::KVKEYE_ISA {
namespace {

KVKEYE_INLINE int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Where a cell of the resized picture lies: the columns [first, first + width) of the patch `patch`.
struct Cell {
  int64_t patch, first, width;
};

KVKEYE_INLINE Cell cell_at(const PackImage& image, int64_t cell) {
  const int64_t cells = blocks_of(image.patch, kCellColumns), first = cell % cells * kCellColumns;
  return {cell / cells, first, smaller(kCellColumns, image.patch - first)};
}

// One item: a tile of columns and a range of rows.
struct Walk {
  const PackImage& image;
  PackScratch at;
  uint8_t* scratch;
  TileColumns tile;
  int64_t first_cell;
};

KVKEYE_INLINE void prepare(Walk& walk, int64_t tile_index) {
  const PackImage& image = walk.image;
  const bool resized = image.columns.taps > 0;
  const int64_t all = image.columns.out / image.patch * blocks_of(image.patch, kCellColumns);
  walk.first_cell = tile_index * image.tile_cells;
  TileColumns& tile = walk.tile;
  tile.axis = &image.columns;
  tile.cells = smaller(image.tile_cells, all - walk.first_cell);
  tile.row_stride = image.row_stride;
  tile.low = 3 * image.width;
  tile.reach = 0;
  for (int64_t lane = 0; lane < tile.cells * kCellColumns; ++lane) {
    const Cell cell = cell_at(image, walk.first_cell + lane / kCellColumns);
    const int64_t column =
        cell.patch * image.patch + cell.first + smaller(lane % kCellColumns, cell.width - 1);
    const int64_t offset = 3 * (resized ? image.columns.first[column] : column);
    tile.column[lane] = (int32_t)column;
    tile.offset[lane] = (int32_t)offset;
    tile.low = smaller(tile.low, offset);
    tile.reach = offset + tap_reach(image.columns.taps) > tile.reach ? offset + tap_reach(image.columns.taps)
                                                                     : tile.reach;
  }
  tile.blocks = (TapBlock*)(walk.scratch + walk.at.blocks);
  tile.pairs = (TapPairs*)(walk.scratch + walk.at.blocks);
  if (resized)
    passes::prepare_weights(tile);
}

// A row of the picture, moved where the vector loads of its end would leave the picture.
KVKEYE_INLINE const uint8_t* source_row(const Walk& walk, int64_t row, int64_t place) {
  const PackImage& image = walk.image;
  const uint8_t* start = image.pixels + row * image.row_stride;
  const uint8_t* end = image.pixels + (image.height - 1) * image.row_stride + 3 * image.width;
  if (walk.tile.reach <= end - start)
    return start;
  uint8_t* padded = walk.scratch + walk.at.padded + place * padded_row(image);
  std::memcpy(padded + walk.tile.low, start + walk.tile.low, 3 * image.width - walk.tile.low);
  return padded;
}

KVKEYE_INLINE uint8_t* ring_line(const Walk& walk, int64_t row) {
  return walk.scratch + walk.at.ring + row % ring_lines(walk.image) * kLineBytes;
}

// The rows [row, row + count) of the picture at the resized width.
KVKEYE_INLINE void read_rows(const Walk& walk, int64_t row, int64_t count, uint8_t* const* lines) {
  const uint8_t* rows[kRowsTogether];
  for (int64_t i = 0; i < count; ++i)
    rows[i] = source_row(walk, row + i, i);
  if (walk.image.columns.taps > 0)
    return passes::horizontal_lines(walk.tile, rows, lines, count);
  for (int64_t i = 0; i < count; ++i)
    passes::copy_line(walk.tile, rows[i], lines[i]);
}

// Reads rows into the ring until it holds those before `end`; returns the first row that it does not hold.
KVKEYE_INLINE int64_t fill_ring(const Walk& walk, int64_t filled, int64_t end) {
  while (filled < end) {
    const int64_t count = smaller(kRowsTogether, walk.image.height - filled);
    uint8_t* lines[kRowsTogether];
    for (int64_t i = 0; i < count; ++i)
      lines[i] = ring_line(walk, filled + i);
    read_rows(walk, filled, count, lines);
    filled += count;
  }
  return filled;
}

KVKEYE_INLINE RowTaps row_taps(const Walk& walk, int64_t row) {
  const ResampleAxis& axis = walk.image.rows;
  const int64_t count = axis.count[row], groups = groups_of_taps(count);
  RowTaps taps{count, groups, axis.weights + row * axis.taps, (const uint8_t**)(walk.scratch + walk.at.lines),
               (int32_t*)(walk.scratch + walk.at.words)};
  for (int64_t i = 0; i < groups * kGroupTaps; ++i)
    taps.lines[i] = ring_line(walk, axis.first[row] + (i < count ? i : count - 1));
  passes::prepare_words(axis, row, taps);
  return taps;
}

// Calls finish(row, lines) with each band of finished lines among the rows [begin, end) of a tile.
template <class Finish>
KVKEYE_INLINE void walk_rows(const Walk& walk, int64_t begin, int64_t end, Finish finish) {
  const ResampleAxis& axis = walk.image.rows;
  uint8_t* const lines = walk.scratch + walk.at.band;
  const int64_t band = walk.image.band;
  int64_t filled = 0;
  for (int64_t row = begin; row < end; ++row) {
    uint8_t* const line = lines + row % band * kLineBytes;
    if (axis.taps == 0) {
      read_rows(walk, row, 1, &line);
    } else {
      filled = filled > axis.first[row] ? filled : axis.first[row];
      filled = fill_ring(walk, filled, axis.first[row] + axis.count[row]);
      passes::vertical_line(axis, row_taps(walk, row), walk.tile.cells, line);
    }
    if (row % band == band - 1)
      finish(row - (band - 1), lines);
  }
}

#if defined(__FMA__)
static constexpr bool kFusedMultiplyAdd = true;
#else
static constexpr bool kFusedMultiplyAdd = false;
#endif

KVKEYE_INLINE void store_rounded(float* target, Vf value, int count) {
  store(target, value, count);
}

KVKEYE_INLINE void store_rounded(bf16* target, Vf value, int count) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(target, (__mmask16)((1u << count) - 1),
                           (__m256i)_mm512_cvtneps_pbh((__m512)value));
#else
  store(target, value, count);
#endif
}

// Levels to values by fma; the binding found that this equals the table.
template <class T>
KVKEYE_INLINE void store_affine(const uint8_t* levels, int64_t count, Vf scale, Vf shift, T* target) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vf level = __builtin_convertvector(load_levels(levels + i), Vf);
    store_rounded(target + i, fma(level, scale, shift), (int)smaller(kLanes, count - i));
  }
}

KVKEYE_INLINE void store_table(const uint8_t* levels, int64_t count, const float* table, float* target) {
#if defined(__AVX512F__)
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  _mm512_mask_storeu_ps(
      target, mask,
      _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, (__m512i)load_levels(levels), table, 4));
#else
  for (int64_t i = 0; i < count; ++i)
    target[i] = table[levels[i]];
#endif
}

KVKEYE_INLINE void store_table(const uint8_t* levels, int64_t count, const float* table, bf16* target) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, table + levels[i], sizeof bits);
    target[i].bits = (uint16_t)(bits >> 16);
  }
}

// One channel of one cell: lines of levels to the rows of a patch.
template <class T>
KVKEYE_INLINE void store_channel(const PackPatchesParams<T>& p, int64_t channel, int64_t width, int64_t patch,
                                 const uint8_t* levels, T* target) {
  const Vf scale = splat(p.scale[channel]), shift = splat(p.shift[channel]);
  const float* table = p.levels + channel * 256;
  if (kFusedMultiplyAdd && p.affine)
    for (int64_t row = 0; row < patch; ++row)
      store_affine(levels + row * kLineBytes, width, scale, shift, target + row * patch);
  else
    for (int64_t row = 0; row < patch; ++row)
      store_table(levels + row * kLineBytes, width, table, target + row * patch);
}

// A band of lines to the tile's cells of a row of patches.
template <class T>
KVKEYE_INLINE void store_patches(const PackPatchesParams<T>& p, const Walk& walk, T* out, int64_t row,
                                 const uint8_t* lines) {
  const int64_t patch = walk.image.patch, area = patch * patch;
  T* band = out + row / patch * (walk.image.columns.out / patch) * 3 * area;
  for (int64_t i = 0; i < walk.tile.cells; ++i) {
    const Cell cell = cell_at(walk.image, walk.first_cell + i);
    for (int64_t channel = 0; channel < 3; ++channel)
      store_channel(p, channel, cell.width, patch, lines + channel * kTileColumns + i * kCellColumns,
                    band + (cell.patch * 3 + channel) * area + cell.first);
  }
}

// A line to the tile's columns of a row of pixels.
KVKEYE_INLINE void store_row(const Walk& walk, uint8_t* out, int64_t row, const uint8_t* line) {
  const int64_t first = walk.first_cell * kCellColumns, columns = walk.image.columns.out;
  for (int64_t i = 0; i < walk.tile.cells; ++i) {
    const int64_t column = first + i * kCellColumns;
    passes::store_pixels(line, i, out + (row * columns + column) * 3,
                         smaller(kCellColumns, columns - column));
  }
}

} // namespace

template <class T> void pack_patches(const PackPatchesParams<T>& p, int64_t begin, int64_t end) {
  int64_t index = 0;
  while (begin < end) {
    while (index + 1 < p.num_images && p.images[index + 1].first_item <= begin)
      ++index;
    const PackImage& image = p.images[index];
    const int64_t last = smaller(end, image.first_item + image.tiles * image.groups);
    T* const out = p.out + p.first_row[index] * 3 * image.patch * image.patch;
    Walk walk{image, pack_scratch(image), p.scratch, {}, -1};
    for (int64_t item = begin - image.first_item; item < last - image.first_item; ++item) {
      const int64_t tile = item / image.groups, top = item % image.groups * image.item_rows;
      if (walk.first_cell != tile * image.tile_cells)
        prepare(walk, tile);
      walk_rows(walk, top, smaller(top + image.item_rows, image.rows.out),
                [&](int64_t row, const uint8_t* line)
                    KVKEYE_LAMBDA { store_patches(p, walk, out, row, line); });
    }
    begin = last;
  }
}

void resize_image(const ResizeImageParams& p, int64_t begin, int64_t end) {
  const PackImage& image = *p.image;
  Walk walk{image, pack_scratch(image), p.scratch, {}, -1};
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / image.groups, top = item % image.groups * image.item_rows;
    if (walk.first_cell != tile * image.tile_cells)
      prepare(walk, tile);
    walk_rows(walk, top, smaller(top + image.item_rows, image.rows.out),
              [&](int64_t row, const uint8_t* line) KVKEYE_LAMBDA { store_row(walk, p.out, row, line); });
  }
}

KVKEYE_INSTANTIATE(pack_patches, PackPatchesParams)

} // namespace kvkeye::KVKEYE_ISA
