// Attention of a few query rows: keys, and then the head's dimensions, lie in the lanes.
//
// A decoded token has only the heads of one group to share a key with, which would leave lanes of rows empty.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kFewRows = 8;

template <class T, class Work> struct FewRows {
  const Work& work;
  int64_t dim, width;               // width: dim in whole vectors
  float *q, *out, *folded;          // [kFewRows, width]
  float* scores;                    // [kFewRows, kTile]
  float *keys, *values;             // [dim, kTile], [kTile, width]
  float *max, *total;               // [kFewRows], of the current split
  float *folded_max, *folded_total; // [kFewRows], of the splits before
  View views[kFewRows];

  FewRows(const Work& of, int64_t head_dim, float scale, float* scratch)
      : work(of), dim(head_dim), width(round_up(head_dim)) {
    Arena arena(scratch);
    q = arena.take(kFewRows * width);
    out = arena.take(kFewRows * width);
    folded = arena.take(kFewRows * width);
    scores = arena.take(kFewRows * kTile);
    keys = arena.take(dim * kTile);
    values = arena.take(kTile * width);
    max = arena.take(kRowVector);
    total = arena.take(kRowVector);
    folded_max = arena.take(kRowVector);
    folded_total = arena.take(kRowVector);
    clear(folded, work.count * width, 0.0f);
    clear(folded_max, kRowVector, -INFINITY);
    clear(folded_total, kRowVector, 0.0f);
    for (int r = 0; r < work.count; ++r) {
      load_row(work.query(r), dim, q + r * width);
      for (int64_t i = r * width; i < (r + 1) * width; i += kLanes)
        store(q + i, load(q + i) * scale);
      views[r] = work.view(r);
    }
  }

  // All rows against positions [begin, end) of one split.
  void attend(int64_t begin, int64_t end) {
    clear(out, work.count * width, 0.0f);
    clear(max, kRowVector, -INFINITY);
    clear(total, kRowVector, 0.0f);
    const T *key_rows[kTile], *value_rows[kTile];
    for (int64_t start = begin; start < end; start += kTile) {
      const int columns = end - start < kTile ? (int)(end - start) : kTile;
      work.locate(start, columns, key_rows, value_rows);
      load_transposed(key_rows, columns, dim, keys);
      multiply<false>({q, width, 1}, keys, kTile, scores, kTile, work.count, dim, round_up(columns));
      for (int r = 0; r < work.count; ++r)
        weigh(r, start, columns);
      load_rows(value_rows, columns, dim, values);
      multiply<true>({scores, kTile, 1}, values, width, out, width, work.count, columns, width);
    }
  }

  // Scores of one row become weights relative to its new maximum; what was summed before is rescaled.
  void weigh(int r, int64_t start, int columns) {
    float *row = scores + r * kTile, *sums = out + r * width;
    const uint64_t all = first_bits(columns), seen = visible(views[r], start) & all;
    if (seen == 0)
      return clear(row, columns, 0.0f);
    const bool whole = seen == all && columns % kLanes == 0;
    Vf peak = splat(max[r]);
    for (int i = 0; i < columns; i += kLanes) {
      const Vf score = load(row + i), kept = whole ? score : hide(score, seen, i, -INFINITY);
      store(row + i, kept);
      peak = KVKEYE_ISA::max(kept, peak);
    }
    const Vf top = splat(largest(peak)), base = base_of(top), keep = weight_of(splat(max[r]) - base);
    Vf part{};
    for (int i = 0; i < columns; i += kLanes) {
      const Vf weight = weight_of(load(row + i) - base);
      store(row + i, weight);
      part = part + weight;
    }
    max[r] = top[0];
    total[r] = fma(splat(total[r]), keep, splat(sum(part)))[0];
    for (int64_t i = 0; i < width; i += kLanes)
      store(sums + i, load(sums + i) * keep);
  }

  // Adds the split to those before it.
  void fold() {
    for (int first = 0; first < work.count; first += kLanes) {
      Totals before{load(folded_max + first), load(folded_total + first)};
      const Joint joint = join(before, {load(max + first), load(total + first)});
      store(folded_max + first, before.max);
      store(folded_total + first, before.total);
      for (int r = first; r < work.count && r < first + kLanes; ++r)
        scale_add(folded + r * width, out + r * width, width, joint.keep[r - first], joint.add[r - first]);
    }
  }

  void finish() const {
    for (int r = 0; r < work.count; ++r)
      write_result(work, r, folded + r * width, dim, folded_max[r], folded_total[r]);
  }

  void store_partial() const {
    for (int r = 0; r < work.count; ++r)
      write_partial(work, r, out + r * width, dim, max[r], total[r]);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
