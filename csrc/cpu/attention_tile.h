// Attention of the rows of one KV head, split by split.
#pragma once

#include "attention_lanes.h"
#include "attention_rows.h"
#include "attention_tiles.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// All splits, or one if `split` is not negative: its state is stored, even where it holds no positions.
template <class Rows> void attend_splits(Rows& rows, int64_t end, int64_t split) {
  if (split >= 0) {
    const int64_t begin = split * kSplitPositions < end ? split * kSplitPositions : end;
    const int64_t last = end - begin < kSplitPositions ? end : begin + kSplitPositions;
    return rows.attend(begin, last, last, true);
  }
  for (int64_t begin = 0; begin < end; begin += kSplitPositions)
    rows.attend(begin, end - begin < kSplitPositions ? end : begin + kSplitPositions, end, false);
  rows.finish();
}

template <class Rows, class Work>
void attend_with(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split,
                 float* scratch) {
  Rows rows(work, dim, softmax_scale, Arena(scratch));
  attend_splits(rows, end, split);
}

// With one fp32 per word (Single): what attend() does for fp32, and for bf16 without rounding weights.
template <class T, class Product, class Work>
void attend_by(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split,
               float* scratch) {
  if (work.count <= kFewRows)
    attend_with<FewRows<T, Work, Product>>(work, dim, softmax_scale, end, split, scratch);
  else
    attend_with<ManyRows<T, Work, Product>>(work, dim, softmax_scale, end, split, scratch);
}

// The rows of `work` against positions [0, end), or those of one split if it is not negative.
template <class T, class Work>
void attend(const Work& work, int64_t dim, float softmax_scale, int64_t end, int64_t split, float* scratch) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(T) == 2) {
    if (active_isa().isa == Isa::amx) {
      acquire_tiles();
      attend_with<TileRows<T, Work>>(work, dim, softmax_scale, end, split, scratch);
      return release_tiles();
    }
    if (fast_bf16_pairs())
      return attend_by<T, Paired>(work, dim, softmax_scale, end, split, scratch);
  }
#endif
  attend_by<T, Single>(work, dim, softmax_scale, end, split, scratch);
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
