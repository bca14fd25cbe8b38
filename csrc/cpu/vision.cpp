// Position table and merging of patches, forward and backward.
#include "kvkeye/vision.h"
#include "kvkeye/common/simd.h"

#include <cstring>

namespace kvkeye::KVKEYE_ISA {
namespace {

// Where an output coordinate falls between two rows (or columns) of the table.
struct Sample {
  int64_t low, high;
  float low_weight, high_weight;
};

KVKEYE_INLINE Sample sample_at(int64_t output, int64_t side, int64_t size) {
  const float scale = (float)side / (float)size;
  const float centre = scale * ((float)output + 0.5f) - 0.5f;
  const float source = centre > 0.0f ? centre : 0.0f;
  const int64_t floor = (int64_t)source;
  const int64_t low = floor < side - 1 ? floor : side - 1;
  const float high_weight = source - (float)low;
  return {low, low < side - 1 ? low + 1 : low, 1.0f - high_weight, high_weight};
}

} // namespace

template <class T>
void interpolate_position(const InterpolatePositionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Sample y = sample_at(row / p.width % p.height, p.side, p.height);
    const Sample x = sample_at(row % p.width, p.side, p.width);
    const T* top = p.table + y.low * p.side * p.dim;
    const T* bottom = p.table + y.high * p.side * p.dim;
    const int64_t left = x.low * p.dim, right = x.high * p.dim;
    for_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf above =
          x.low_weight * load(top + left + i, lanes) + x.high_weight * load(top + right + i, lanes);
      const Vf below =
          x.low_weight * load(bottom + left + i, lanes) + x.high_weight * load(bottom + right + i, lanes);
      store(p.out + row * p.dim + i, y.low_weight * above + y.high_weight * below, lanes);
    });
  }
}

template <class T>
void interpolate_position_backward(const InterpolatePositionBackwardParams<T>& p, int64_t begin,
                                   int64_t end) {
  const int64_t first = begin * kColumnBlock;
  const int64_t last = end * kColumnBlock < p.dim ? end * kColumnBlock : p.dim;
  for (int64_t row = 0; row < p.frames * p.height * p.width; ++row) {
    const Sample y = sample_at(row / p.width % p.height, p.side, p.height);
    const Sample x = sample_at(row % p.width, p.side, p.width);
    const struct {
      int64_t cell;
      float weight;
    } corners[4] = {{y.low * p.side + x.low, y.low_weight * x.low_weight},
                    {y.low * p.side + x.high, y.low_weight * x.high_weight},
                    {y.high * p.side + x.low, y.high_weight * x.low_weight},
                    {y.high * p.side + x.high, y.high_weight * x.high_weight}};
    for_vectors(first, last, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf grad = load(p.grad + row * p.dim + i, lanes);
      for (const auto& corner : corners) {
        float* target = p.grad_table + corner.cell * p.dim + i;
        store(target, fma(grad, splat(corner.weight), load(target, lanes)), lanes);
      }
    });
  }
}

void merge_patches(const MergePatchesParams& p, int64_t begin, int64_t end) {
  const int64_t across = p.width / p.merge, down = p.height / p.merge;
  for (int64_t window = begin; window < end; ++window) {
    const int64_t frame = window / (across * down), y = window / across % down, x = window % across;
    for (int64_t part = 0; part < p.merge * p.merge; ++part) {
      const int64_t line = y * p.merge + part / p.merge, column = x * p.merge + part % p.merge;
      const int64_t row = (frame * p.height + line) * p.width + column;
      const int64_t merged = (window * p.merge * p.merge + part) * p.row_bytes;
      if (p.split)
        std::memcpy(p.target + row * p.row_bytes, p.source + merged, p.row_bytes);
      else
        std::memcpy(p.target + merged, p.source + row * p.source_stride, p.row_bytes);
    }
  }
}

KVKEYE_INSTANTIATE(interpolate_position, InterpolatePositionParams)
KVKEYE_INSTANTIATE(interpolate_position_backward, InterpolatePositionBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
