// Rows in the lanes: what they see, their outputs and softmax states, whatever multiplies.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Groups of at most kVectors vectors of rows; a group's scores are at work together. Arrays have room for
// kGroup rows in each: row r of a group has the slot group * kGroup + r. The state of the split at work is
// that of all groups (kTogether), or of one group after the other.
template <class Work, int kVectors, bool kTogether> struct LaneRows {
  static constexpr int kGroup = kVectors * kLanes;
  const Work& work;
  int64_t dim, width; // width: dim in whole vectors of 16
  int groups;
  int* first;          // [groups + 1]: the first row of each group, which share the vectors evenly
  float *out, *folded; // [groups or 1, width, kGroup], [groups, width, kGroup]
  float* scores;       // [kTile, kGroup]
  float* result;       // [kLanes, width]: rows again
  float *max, *total;  // [groups or 1, kGroup], of the current split
  float *folded_max, *folded_total; // [groups, kGroup], of the splits before
  int64_t* seen;                    // [groups, kGroup]: positions; rows behind the last one see none
  int64_t *least, *most;            // [groups]: positions that all rows see, and that none sees from there on

  LaneRows(const Work& of, int64_t head_dim, Arena& arena)
      : work(of), dim(head_dim), width(padded_dim(head_dim)) {
    const int vectors = (work.count + kLanes - 1) / kLanes;
    groups = (vectors + kVectors - 1) / kVectors;
    first = (int*)arena.take(groups + 1);
    for (int group = 0; group < groups; ++group)
      first[group] = vectors * group / groups * kLanes;
    first[groups] = work.count;
    const int rows = groups * kGroup, live = kTogether ? rows : kGroup;
    out = arena.take(live * width);
    folded = arena.take(rows * width);
    scores = arena.take(kTile * kGroup);
    result = arena.take(kLanes * width);
    max = arena.take(live);
    total = arena.take(live);
    folded_max = arena.take(rows);
    folded_total = arena.take(rows);
    seen = (int64_t*)arena.take(2 * rows);
    least = (int64_t*)arena.take(2 * groups);
    most = (int64_t*)arena.take(2 * groups);
    clear(folded, rows * width, 0.0f);
    clear(folded_max, rows, -INFINITY);
    clear(folded_total, rows, 0.0f);
    for (int group = 0; group < groups; ++group)
      count_seen(group);
  }

  int rows(int group) const { return first[group + 1] - first[group]; }
  int vectors(int group) const { return (rows(group) + kLanes - 1) / kLanes; }

  // The row in a slot, or -1.
  int row_of(int slot) const {
    const int group = slot / kGroup;
    return slot % kGroup < rows(group) ? first[group] + slot % kGroup : -1;
  }

  // Where the state of a slot lies.
  static constexpr int live(int slot) { return kTogether ? slot : slot % kGroup; }

  // Calls body(slot) with the first slot of every vector of a group.
  template <class Body> void for_slots(int group, const Body& body) const {
    for (int i = 0; i < rows(group); i += kLanes)
      body(group * kGroup + i);
  }

  void count_seen(int group) {
    int64_t* own = seen + group * kGroup;
    for (int i = 0; i < kGroup; ++i)
      own[i] = i < rows(group) ? work.seen(first[group] + i) : 0;
    least[group] = most[group] = own[0];
    for (int i = 1; i < rows(group); ++i) {
      least[group] = own[i] < least[group] ? own[i] : least[group];
      most[group] = own[i] > most[group] ? own[i] : most[group];
    }
  }

  // The place of slots [slot, slot + kLanes), where dimension d is d * kGroup further on.
  float* column(float* of, int slot) const { return of + slot / kGroup * width * kGroup + slot % kGroup; }

  // A split begins, for all groups or for one.
  void begin_split() {
    const int rows = kTogether ? groups * kGroup : kGroup;
    clear(out, rows * width, 0.0f);
    clear(max, rows, -INFINITY);
    clear(total, rows, 0.0f);
  }

  KVKEYE_APART void hide_unseen(int r, int64_t start, int columns) {
    Vi own;
    for (int i = 0; i < kLanes; ++i)
      own[i] = seen_columns(seen[r + i], start, columns);
    float* score = scores + r % kGroup;
    for (int j = 0; j < kTile; ++j, score += kGroup)
      store(score, j < own ? load(score) : splat(-INFINITY));
  }

  // Adds a group's split to those before it.
  void fold(int group) {
    for_slots(group, [&](int slot) {
      Totals before{load(folded_max + slot), load(folded_total + slot)};
      const Joint joint = join(before, {load(max + live(slot)), load(total + live(slot))});
      store(folded_max + slot, before.max);
      store(folded_total + slot, before.total);
      float *sums = column(folded, slot), *split = column(out, live(slot));
      for (int64_t d = 0; d < dim * kGroup; d += kGroup)
        store(sums + d, fma(load(split + d), joint.add, load(sums + d) * joint.keep));
    });
  }

  // Calls write(row, its values) with the rows whose values begin at `values`.
  template <class Write> void for_rows(int slot, const float* values, const Write& write) const {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = d + i < dim ? load(values + (d + i) * kGroup) : Vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        store(result + i * width + d, block[i]);
    }
    for (int i = 0; i < kLanes && row_of(slot + i) >= 0; ++i)
      write(i, row_of(slot + i), result + i * width);
  }

  void finish(int group) const {
    for_slots(group, [&](int slot) {
      for_rows(slot, column(folded, slot), [&](int i, int row, const float* values) {
        write_result(work, row, values, dim, folded_max[slot + i], folded_total[slot + i]);
      });
    });
  }

  void store_partial(int group) const {
    for_slots(group, [&](int slot) {
      for_rows(slot, column(out, live(slot)), [&](int i, int row, const float* values) {
        write_partial(work, row, values, dim, max[live(slot) + i], total[live(slot) + i]);
      });
    });
  }

  // The split of a group is complete.
  void close(int group, bool partial) {
    if (partial)
      store_partial(group);
    else
      fold(group);
  }

  void finish() const {
    for (int group = 0; group < groups; ++group)
      finish(group);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
