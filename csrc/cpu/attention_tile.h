// Attention of the rows of one KV head, split by split.
#pragma once

#include "attention_lanes.h"
#include "attention_rows.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

template <class Rows> void attend_splits(Rows& rows, int64_t end, int64_t split) {
  const int64_t first = split < 0 ? 0 : split * kSplitPositions;
  for (int64_t begin = first; begin < end; begin += kSplitPositions) {
    rows.attend(begin, end - begin < kSplitPositions ? end : begin + kSplitPositions);
    if (split >= 0)
      return rows.store_partial();
    rows.fold();
  }
  if (split >= 0) {
    rows.attend(0, 0);
    return rows.store_partial();
  }
  rows.finish();
}

// The rows of `work` against positions [0, end), or those of one split if it is not negative.
template <class T, class Work>
void attend(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split, float* scratch) {
  const float scale = softmax_scale * kLog2E;
  if (work.count <= kFewRows) {
    FewRows<T, Work> rows(work, dim, scale, scratch);
    attend_splits(rows, end, split);
  } else {
    ManyRows<T, Work> rows(work, dim, scale, scratch);
    attend_splits(rows, end, split);
  }
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
