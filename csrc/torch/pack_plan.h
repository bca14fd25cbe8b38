// From pictures and target sizes to what the packing kernels read: weights, tiles, items, values of the
// levels. Plain C++, so that every binding can use it.
#pragma once

#include "kvkeye/vision_pack.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <vector>

namespace kvkeye {

// Weights of the axes of one call, each pair of sizes once.
class ResampleAxes {
public:
  explicit ResampleAxes(Filter filter) : filter_(filter) {}

  // The axis from `in` to `out`; without weights where they are equal.
  ResampleAxis axis(int64_t in, int64_t out) {
    if (in == out)
      return {in, out, 0, 0, nullptr, nullptr, nullptr};
    for (const Entry& entry : entries_)
      if (entry.axis.in == in && entry.axis.out == out)
        return entry.axis;
    ResampleAxis axis{in, out, resample_taps(in, out, filter_), 0, nullptr, nullptr, nullptr};
    std::unique_ptr<int32_t[]> memory(new int32_t[out * (2 + axis.taps)]);
    axis.first = memory.get();
    axis.count = axis.first + out;
    axis.weights = axis.count + out;
    const std::unique_ptr<double[]> scratch(new double[out * axis.taps]);
    fill_resample(axis, filter_, scratch.get());
    entries_.push_back({axis, std::move(memory)});
    return axis;
  }

private:
  struct Entry {
    ResampleAxis axis;
    std::unique_ptr<int32_t[]> memory;
  };
  Filter filter_;
  std::list<Entry> entries_;
};

// Cuts a picture into items: tiles of equal width, an even number of groups of rows, so that two threads
// finish together.
inline void share_out(PackImage& image) {
  const int64_t cells = image.columns.out / image.patch * blocks_of(image.patch, kCellColumns);
  image.tile_cells = blocks_of(cells, blocks_of(cells, kTileCells));
  image.tiles = blocks_of(cells, image.tile_cells);
  const int64_t groups = blocks_of(image.rows.out, kItemRows), bands = blocks_of(image.rows.out, image.band);
  image.item_rows = blocks_of(bands, groups > 1 ? groups + groups % 2 : 1) * image.band;
  image.groups = blocks_of(image.rows.out, image.item_rows);
}

// The pictures of one call as items.
struct PackPlan {
  explicit PackPlan(Filter filter) : axes(filter) {}

  // pixels [height, width, 3], rows row_stride bytes apart, to `rows` x `columns`, in patches of `patch`
  // columns, `band` rows at a time.
  void add(const uint8_t* pixels, int64_t height, int64_t width, int64_t row_stride, int64_t rows,
           int64_t columns, int64_t patch, int64_t band) {
    PackImage image{
        pixels, height, width, row_stride, axes.axis(height, rows), axes.axis(width, columns), patch, band, 0,
        0,      0,      0,     items};
    share_out(image);
    items += image.tiles * image.groups;
    const int64_t needed = pack_scratch(image).bytes;
    scratch = needed > scratch ? needed : scratch;
    images.push_back(image);
  }

  ResampleAxes axes;
  std::vector<PackImage> images;
  int64_t items = 0, scratch = 0;
};

// What becomes of each level: (level / 255 - mean) / std in fp32, rounded to the storage type.
template <class T> struct LevelValues {
  float table[3 * 256], scale[3], shift[3];
  bool affine; // fma(level, scale, shift) gives the table's values after rounding

  LevelValues(const std::vector<double>& mean, const std::vector<double>& std) : affine(true) {
    for (int channel = 0; channel < 3; ++channel) {
      const float centre = (float)mean[channel], width = (float)std[channel];
      scale[channel] = (float)(1.0 / (255.0 * (double)width));
      shift[channel] = (float)(-(double)centre / (double)width);
      for (int level = 0; level < 256; ++level) {
        const float value = rounded(((float)level / 255.0f - centre) / width);
        const float fused = rounded(std::fma((float)level, scale[channel], shift[channel]));
        table[channel * 256 + level] = value;
        // Conversion instructions may flush subnormal values.
        affine = affine && std::memcmp(&value, &fused, sizeof value) == 0 &&
                 (value == 0.0f || std::isnormal(value));
      }
    }
  }

private:
  static float rounded(float value) {
    if (sizeof(T) == sizeof(float) || !std::isfinite(value))
      return value;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
  }
};

// Memory of one thread, aligned to whole cache lines.
class AlignedBytes {
public:
  explicit AlignedBytes(int64_t size) : memory_(new uint8_t[size + 64]) {}
  uint8_t* data() { return memory_.get() + (64 - (uintptr_t)memory_.get() % 64) % 64; }

private:
  std::unique_ptr<uint8_t[]> memory_;
};

} // namespace kvkeye
