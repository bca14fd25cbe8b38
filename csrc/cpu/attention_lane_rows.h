// Rows in the lanes: their views, outputs and softmax states, whatever multiplies.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Groups of kVectors vectors of rows; a group's scores are at work together.
template <class Work, int kVectors> struct LaneRows {
  static constexpr int kGroup = kVectors * kLanes;
  const Work& work;
  int64_t dim, width;               // width: dim in whole vectors of 16
  int groups;                       // of kGroup rows
  float *out, *folded;              // [groups, width, kGroup]
  float* scores;                    // [kTile, kGroup]
  float* result;                    // [kLanes, width]: rows again
  float *max, *total;               // [groups, kGroup], of the current split
  float *folded_max, *folded_total; // [groups, kGroup], of the splits before
  View* views;                      // [groups, kGroup]; those behind the last row see nothing
  int64_t *least, *most;            // [groups]: positions that all rows see, and that none sees from there on

  LaneRows(const Work& of, int64_t head_dim, Arena& arena)
      : work(of), dim(head_dim), width(padded_dim(head_dim)), groups((work.count + kGroup - 1) / kGroup) {
    const int64_t rows = groups * kGroup;
    out = arena.take(rows * width);
    folded = arena.take(rows * width);
    scores = arena.take(kTile * kGroup);
    result = arena.take(kLanes * width);
    max = arena.take(rows);
    total = arena.take(rows);
    folded_max = arena.take(rows);
    folded_total = arena.take(rows);
    views = (View*)arena.take(rows * (int64_t)(sizeof(View) / sizeof(float)));
    least = (int64_t*)arena.take(2 * groups);
    most = (int64_t*)arena.take(2 * groups);
    clear(folded, rows * width, 0.0f);
    clear(folded_max, rows, -INFINITY);
    clear(folded_total, rows, 0.0f);
    for (int r = 0; r < rows; ++r)
      view_row(r);
  }

  void view_row(int r) {
    views[r] = r < work.count ? work.view(r) : View{0, 0};
    if (r >= work.count)
      return;
    const int64_t end = views[r].prefix + (views[r].bits != 0 ? 64 : 0);
    int64_t &low = least[r / kGroup], &high = most[r / kGroup];
    low = r % kGroup == 0 || views[r].prefix < low ? views[r].prefix : low;
    high = r % kGroup == 0 || end > high ? end : high;
  }

  // The place of rows [r, r + kLanes), where dimension d is d * kGroup further on.
  float* column(float* of, int r) const { return of + r / kGroup * width * kGroup + r % kGroup; }

  void begin_split() {
    clear(out, groups * kGroup * width, 0.0f);
    clear(max, groups * kGroup, -INFINITY);
    clear(total, groups * kGroup, 0.0f);
  }

  // How many vectors of a group hold rows.
  int vectors(int group) const {
    const int left = (work.count - group * kGroup + kLanes - 1) / kLanes;
    return left < kVectors ? left : kVectors;
  }

  KVKEYE_APART void hide_unseen(int r, int64_t start, int columns) {
    uint32_t seen[2][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t bits = visible(views[r + i], start) & first_bits(columns);
      seen[0][i] = (uint32_t)bits;
      seen[1][i] = (uint32_t)(bits >> 32);
    }
    float* score = scores + r % kGroup;
    for (int half = 0; half < 2; ++half) {
      Vu bits;
      std::memcpy(&bits, seen[half], sizeof bits);
      for (int j = 0; j < 32; ++j, bits >>= 1, score += kGroup)
        store(score, (bits & 1u) != 0 ? load(score) : splat(-INFINITY));
    }
  }

  // Adds the split to those before it.
  void fold() {
    for (int r = 0; r < groups * kGroup; r += kLanes) {
      Totals before{load(folded_max + r), load(folded_total + r)};
      const Joint joint = join(before, {load(max + r), load(total + r)});
      store(folded_max + r, before.max);
      store(folded_total + r, before.total);
      float *sums = column(folded, r), *split = column(out, r);
      for (int64_t d = 0; d < dim * kGroup; d += kGroup)
        store(sums + d, fma(load(split + d), joint.add, load(sums + d) * joint.keep));
    }
  }

  // Calls write(r, row) with each row of out or folded.
  template <class Write> void for_rows(float* of, const Write& write) const {
    for (int r = 0; r < work.count; r += kLanes) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          block[i] = d + i < dim ? load(column(of, r) + (d + i) * kGroup) : Vf{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          store(result + i * width + d, block[i]);
      }
      for (int i = 0; i < kLanes && r + i < work.count; ++i)
        write(r + i, result + i * width);
    }
  }

  void finish() const {
    for_rows(folded, [&](int r, const float* row) {
      write_result(work, r, row, dim, folded_max[r], folded_total[r]);
    });
  }

  void store_partial() const {
    for_rows(out, [&](int r, const float* row) { write_partial(work, r, row, dim, max[r], total[r]); });
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
