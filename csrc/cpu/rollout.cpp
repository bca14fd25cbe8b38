// Scores of candidates: each frame of the clean prediction is pooled, compared and forgotten.
#include "kvkeye/rollout.h"
#include "kvkeye/common/simd.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

// Means of a plane's grid x grid cells less their mean; returns the plane's mean. at(i, lanes) gives
// elements.
template <class T, class At>
KVKEYE_INLINE float pool_plane(const ScoreCandidatesParams<T>& p, float* columns, float* cells, At at) {
  float total = 0.0f, middle = 0.0f;
  for (int64_t i = 0; i < p.grid; ++i) {
    const int64_t top = i * p.height / p.grid, bottom = (i + 1) * p.height / p.grid;
    for_vectors(p.width, [&](int64_t x, int lanes) KVKEYE_LAMBDA {
      Vf sum{};
      for (int64_t row = top; row < bottom; ++row)
        sum += at(row * p.width + x, lanes);
      store(columns + x, sum, lanes);
    });
    for (int64_t j = 0; j < p.grid; ++j) {
      const int64_t left = j * p.width / p.grid, right = (j + 1) * p.width / p.grid;
      const float sum = sum_vectors(
          right - left, [&](int64_t x, int lanes) KVKEYE_LAMBDA { return load(columns + left + x, lanes); });
      const float mean = sum / (float)((bottom - top) * (right - left));
      cells[i * p.grid + j] = mean;
      total += sum;
      middle += mean;
    }
  }
  middle /= (float)(p.grid * p.grid);
  for (int64_t i = 0; i < p.grid * p.grid; ++i)
    cells[i] -= middle;
  return total / (float)(p.height * p.width);
}

KVKEYE_INLINE float product(const float* a, const float* b, int64_t size) {
  return sum_vectors(size, [&](int64_t i, int lanes)
                               KVKEYE_LAMBDA { return load(a + i, lanes) * load(b + i, lanes); });
}

// The clean prediction x - sigma v, elements from `at` on.
template <class T> KVKEYE_INLINE Vf clean(const ScoreCandidatesParams<T>& p, int64_t at, int lanes) {
  return fma(splat(-p.sigma), load(p.v + at, lanes), load(p.x + at, lanes));
}

// Sum of |frame - frame before| over one plane; before the first comes the guide.
template <class T>
KVKEYE_INLINE float move_plane(const ScoreCandidatesParams<T>& p, int64_t plane, int64_t frame,
                               int64_t channel) {
  const int64_t size = p.height * p.width;
  return sum_vectors(size, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf before =
        frame == 0 ? load(p.guide + channel * size + i, lanes) : clean(p, plane - size + i, lanes);
    const Vf moved = clean(p, plane + i, lanes) - before;
    return moved < 0.0f ? -moved : moved;
  });
}

template <class T> void score_frame(const ScoreCandidatesParams<T>& p, int64_t item) {
  const int64_t candidate = item / p.frames, frame = item % p.frames;
  const int64_t size = p.height * p.width, cells = p.grid * p.grid;
  float *pooled = p.scratch, *columns = p.scratch + cells;
  float along = 0.0f, own = 0.0f, target = 0.0f, moved = 0.0f, drifted = 0.0f;
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    const int64_t plane = ((candidate * p.channels + channel) * p.frames + frame) * size;
    const float mean = pool_plane(
        p, columns, pooled, [&](int64_t i, int lanes) KVKEYE_LAMBDA { return clean(p, plane + i, lanes); });
    const float* guide = p.guide_cells + channel * cells;
    along += product(pooled, guide, cells);
    own += product(pooled, pooled, cells);
    target += product(guide, guide, cells);
    drifted += (mean - p.guide_means[channel]) * (mean - p.guide_means[channel]);
    moved += move_plane(p, plane, frame, channel);
  }
  const float norms = std::sqrt(own) * std::sqrt(target);
  p.similarity[item] = norms > 0.0f ? along / norms : along;
  p.motion[item] = moved / (float)(p.channels * size);
  p.drift[item] = std::sqrt(drifted / (float)p.channels);
}

} // namespace

template <class T> void pool_guide(const ScoreCandidatesParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; ++channel) {
    const float* plane = p.guide + channel * p.height * p.width;
    p.guide_means[channel] =
        pool_plane(p, p.scratch, p.guide_cells + channel * p.grid * p.grid,
                   [&](int64_t i, int lanes) KVKEYE_LAMBDA { return load(plane + i, lanes); });
  }
}

template <class T> void score_candidates(const ScoreCandidatesParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item)
    score_frame(p, item);
}

KVKEYE_INSTANTIATE(pool_guide, ScoreCandidatesParams)
KVKEYE_INSTANTIATE(score_candidates, ScoreCandidatesParams)

} // namespace kvkeye::KVKEYE_ISA
