// The plan of a pack_patches launch: one piece of host memory, to be copied to the device once per call.
// Plain C++.
//
// Bytes: 88 per picture, 3 KiB of levels, and 4 out (taps + 2) per distinct pair of sizes of an axis: the
// frames of a clip share theirs. One picture made 1036 x 1036 from fewer pixels takes 61 kB, from twelve
// times as many 144 kB.
#pragma once

#include "kvkeye/common/blocks.h"
#include "kvkeye/resample.h"
#include "kvkeye/vision_pack_cuda.h"

#include <cstring>
#include <vector>

namespace kvkeye {

class CudaPackPlan {
public:
  explicit CudaPackPlan(Filter filter) : filter_(filter) {}

  // pixels [height, width, 3] on the device to rows x columns, multiples of kCudaPatch.
  void add(const uint8_t* pixels, int64_t height, int64_t width, int64_t row_stride, int64_t rows,
           int64_t columns) {
    const int64_t patch_rows = rows / kCudaPatch, patch_columns = columns / kCudaPatch;
    const int64_t tile_columns = blocks_of(patch_columns, kCudaTilePatches);
    images_.push_back({pixels, row_stride, patches_, tiles_, (int32_t)patch_columns, (int32_t)tile_columns,
                       axis(height, rows), axis(width, columns)});
    patches_ += patch_rows * patch_columns;
    tiles_ += patch_rows * tile_columns;
  }

  int64_t patches() const { return patches_; }

  int64_t bytes() const { return tables_at() + (int64_t)(tables_.size() * sizeof(int32_t)); }

  // levels [3, 256]; memory of bytes(), aligned to 16.
  void write(char* memory, const float* levels) const {
    std::memcpy(memory, images_.data(), images_.size() * sizeof(PackCudaImage));
    std::memcpy(memory + levels_at(), levels, kLevelBytes);
    std::memcpy(memory + tables_at(), tables_.data(), tables_.size() * sizeof(int32_t));
  }

  // `memory` is the device's copy.
  template <class T> PackCudaParams<T> params(const char* memory, T* out) const {
    return {reinterpret_cast<const PackCudaImage*>(memory),
            reinterpret_cast<const float*>(memory + levels_at()),
            reinterpret_cast<const int32_t*>(memory + tables_at()),
            out,
            (int64_t)images_.size(),
            tiles_};
  }

private:
  static constexpr int64_t kLevelBytes = 3 * 256 * sizeof(float);

  int64_t levels_at() const { return (int64_t)(images_.size() * sizeof(PackCudaImage)); }
  int64_t tables_at() const { return levels_at() + kLevelBytes; }

  PackCudaAxis axis(int64_t in, int64_t out) {
    for (const PackCudaAxis& known : axes_)
      if (known.in == in && known.out == out)
        return known;
    const int32_t taps = in == out ? 1 : resample_taps(in, out, filter_);
    PackCudaAxis made{(int64_t)tables_.size(), (int32_t)in, (int32_t)out, taps, 0};
    tables_.resize(tables_.size() + (size_t)(out * (taps + 2)));
    std::vector<int32_t> weights((size_t)(out * taps)); // [out, taps]
    int32_t* const first = tables_.data() + made.start;
    ResampleAxis filled{in, out, taps, 0, first, first + out, weights.data()};
    if (in == out)
      fill_copy(filled);
    else
      fill_resample(filled, filter_, std::vector<double>(weights.size()).data());
    made.precision = filled.precision;
    for (int64_t i = 0; i < out * taps; ++i)
      first[2 * out + i % taps * out + i / taps] = weights[(size_t)i];
    axes_.push_back(made);
    return made;
  }

  // An axis that keeps its size: every output is its input, times one.
  static void fill_copy(ResampleAxis& axis) {
    axis.precision = 1;
    for (int64_t output = 0; output < axis.out; ++output) {
      axis.first[output] = (int32_t)output;
      axis.count[output] = 1;
      axis.weights[output] = 1 << axis.precision;
    }
  }

  Filter filter_;
  int64_t patches_ = 0, tiles_ = 0;
  std::vector<PackCudaImage> images_;
  std::vector<PackCudaAxis> axes_;
  std::vector<int32_t> tables_;
};

} // namespace kvkeye
