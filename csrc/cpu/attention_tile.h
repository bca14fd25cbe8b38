// Attention of the rows of one KV head, split by split.
#pragma once

#include "attention_lanes.h"
#include "attention_rows.h"
#include "attention_tiles.h"

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

template <class Rows, class Work>
void attend_with(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split,
                 float* scratch) {
  Rows rows(work, dim, softmax_scale, Arena(scratch));
  attend_splits(rows, end, split);
}

// The rows of `work` against positions [0, end), or those of one split if it is not negative.
template <class T, class Work>
void attend(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split, float* scratch) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(T) == 2)
    if (active_isa().isa == Isa::amx) {
      acquire_tiles();
      attend_with<TileRows<T, Work>>(work, dim, softmax_scale, end, split, scratch);
      return release_tiles();
    }
#endif
  if (work.count <= kFewRows)
    attend_with<FewRows<T, Work>>(work, dim, softmax_scale, end, split, scratch);
  else
    attend_with<ManyRows<T, Work>>(work, dim, softmax_scale, end, split, scratch);
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
