// Scores of candidates in a chunk rollout.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// pool_guide: items are channels. score_candidates: items are candidates times frames.
template <class T> struct ScoreCandidatesParams {
  const T *x, *v;                     // [candidates, channels, frames, height, width]
  const float* guide;                 // [channels, height, width]
  float* guide_cells;                 // [channels, grid, grid], centred
  float* guide_means;                 // [channels]
  float *similarity, *motion, *drift; // [candidates, frames]
  int64_t channels, frames, height, width, grid;
  float sigma;
  float* scratch; // score_scratch() floats, one per thread
};

static inline int64_t score_scratch(int64_t width, int64_t grid) {
  return width + grid * grid + 64;
}

KVKEYE_KERNEL(pool_guide, ScoreCandidatesParams)
KVKEYE_KERNEL(score_candidates, ScoreCandidatesParams)

} // namespace kvkeye
