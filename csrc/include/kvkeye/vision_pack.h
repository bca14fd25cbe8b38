// Pictures of any size to resized, normalised, patchified rows in one pass.
//
// The resized picture is cut into tiles of 16 cells, a cell being 16 columns of one patch (the columns of a
// patch are padded to whole cells). A tile is walked from top to bottom: each input row that its rows need is
// resampled horizontally once into a ring of 8-bit rows, the vertical weights read the ring, and the finished
// rows of one band of patches are stored patch after patch. What is held per thread is the ring and the band,
// not a picture.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/common/kernel.h"
#include "kvkeye/resample.h"

namespace kvkeye {

static constexpr int64_t kCellColumns = 16;
static constexpr int64_t kTileCells = 16;
static constexpr int64_t kTileColumns = kTileCells * kCellColumns;
static constexpr int64_t kLineBytes = 3 * kTileColumns; // one row of a tile: [3, kTileColumns]
static constexpr int64_t kItemRows = 112;               // rows of one item, about
static constexpr int64_t kGroupTaps = 4;                // weights that are applied together
static constexpr int64_t kDigits = 3;                   // a weight is three signed bytes
static constexpr int64_t kSamples = 16;                 // (column, channel) pairs of one vector
static constexpr int64_t kCellVectors = 3 * kCellColumns / kSamples;
static constexpr int64_t kTileVectors = kTileCells * kCellVectors;
static constexpr int64_t kPieces = 7;
static constexpr int64_t kRowsTogether = 2; // input rows that share the loaded weights

// Four taps of sixteen samples: bytes from [offset, offset + 64 pieces) of a row, and their weights by digit.
struct TapBlock {
  int32_t offset, pieces;
  uint64_t mask[kPieces]; // which bytes come from each 64
  uint8_t index[64];      // and from where in them
  uint8_t weights[kDigits][64];
};

// The AVX2 build's form: four taps of one column, upper and lower part, (taps 0 and 1, taps 2 and 3) per
// channel.
struct TapPairs {
  int16_t high[16], low[16];
};

// Memory for the weights of a tile, per group of taps.
static constexpr int64_t kTapBytes = kTileColumns * (int64_t)sizeof(TapPairs);
static_assert(kTileVectors * (int64_t)sizeof(TapBlock) <= kTapBytes, "both forms fit");

// One picture and its way to the target size. An axis without a resize has taps = 0.
struct PackImage {
  const uint8_t* pixels; // [height, width, 3], rows row_stride bytes apart
  int64_t height, width, row_stride;
  ResampleAxis rows, columns;
  int64_t patch;         // columns between patch borders
  int64_t band;          // rows stored together
  int64_t tiles, groups; // items: tiles times groups of item_rows rows, tile by tile
  int64_t item_rows, tile_cells;
  int64_t first_item;
};

// Rows of patches, (channel, row, column) order within a patch.
template <class T> struct PackPatchesParams {
  const PackImage* images; // [num_images]
  int64_t num_images;
  const int64_t* first_row; // [num_images], in out
  T* out;                   // [patches, 3 patch^2]
  const float* levels;      // [3, 256], the value of each level, rounded to T
  const float* scale;       // [3], and shift: fma(level, scale, shift) gives the same values after rounding
  const float* shift;       // [3]
  bool affine;              // whether it does
  uint8_t* scratch;         // pack_scratch(image).bytes for the neediest image, aligned to 64, one per thread
};

// One picture to 8-bit pixels.
struct ResizeImageParams {
  const PackImage* image;
  uint8_t* out;     // [rows, columns, 3]
  uint8_t* scratch; // as above
};

constexpr int64_t groups_of_taps(int64_t taps) {
  return (taps + kGroupTaps - 1) / kGroupTaps;
}

// Bytes from the first tap of a lane on that may be read.
constexpr int64_t tap_reach(int64_t taps) {
  return groups_of_taps(taps) * kGroupTaps * 3 + 64;
}

// Scratch of one thread, each part in whole 64 bytes: the finished lines, the ring, the horizontal weights,
// the last rows of the picture with room to read on, the vertical weights, and the lines that they apply to.
struct PackScratch {
  int64_t band, ring, blocks, padded, words, lines, bytes;
};

constexpr int64_t whole_lines(int64_t bytes) {
  return (bytes + 63) / 64 * 64;
}

// Lines held for the vertical pass: those of one output row, and what is read ahead.
constexpr int64_t ring_lines(const PackImage& image) {
  return image.rows.taps > 0 ? image.rows.taps + kRowsTogether - 1 : 0;
}

constexpr int64_t padded_row(const PackImage& image) {
  return whole_lines(3 * image.width + tap_reach(image.columns.taps));
}

constexpr PackScratch pack_scratch(const PackImage& image) {
  PackScratch at{};
  const int64_t groups = groups_of_taps(image.rows.taps);
  at.ring = at.band + kLineBytes * image.band;
  at.blocks = at.ring + kLineBytes * ring_lines(image);
  at.padded = at.blocks + kTapBytes * groups_of_taps(image.columns.taps);
  at.words = at.padded + kRowsTogether * padded_row(image);
  at.lines = at.words + whole_lines(groups * kDigits * 4);
  at.bytes = at.lines + whole_lines(groups * kGroupTaps * (int64_t)sizeof(uint8_t*));
  return at;
}

KVKEYE_KERNEL(pack_patches, PackPatchesParams)
KVKEYE_UNTYPED_KERNEL(resize_image, ResizeImageParams)

} // namespace kvkeye
