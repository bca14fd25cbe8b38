// Attention of many query rows: the rows lie in the lanes.
//
// Queries are transposed once and keys and values broadcast as they are, so a score tile, its maximum and its
// sum go down the lanes without a shuffle, and a head of 72 is 72 steps.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kGroupVectors = 3, kSteps = 8; // 24 sums, 3 vectors and 1 step in 32 registers
#else
constexpr int kGroupVectors = 2, kSteps = 4; // 8 sums, 2 vectors and 1 step in 16 registers
#endif
constexpr int kGroup = kGroupVectors * kLanes; // rows whose scores are at work together

// c[m, lanes] = start + sum_k a[k, m] b[k, lanes] for M rows of N vectors; start: 0, or c * keep[lanes].
template <int M, int N, bool kKeep>
KVKEYE_APART void lane_block(const float* a, int64_t a_row, const float* b, float* c, int64_t depth,
                             const Vf* keep) {
  Vf total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      total[m][n] = kKeep ? load(c + m * kGroup + n * kLanes) * keep[n] : Vf{};
  for (int64_t k = 0; k < depth; ++k, a += a_row, b += kGroup) {
    Vf lanes[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      lanes[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf step = splat(a[m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        total[m][n] = fma(step, lanes[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(c + m * kGroup + n * kLanes, total[m][n]);
}

template <int N, bool kKeep>
void lane_product(const float* a, int64_t a_row, const float* b, float* c, int64_t rows, int64_t depth,
                  const Vf* keep) {
  int64_t i = 0;
  for (; i + kSteps <= rows; i += kSteps)
    lane_block<kSteps, N, kKeep>(a + i, a_row, b, c + i * kGroup, depth, keep);
  for (; i < rows; ++i)
    lane_block<1, N, kKeep>(a + i, a_row, b, c + i * kGroup, depth, keep);
}

template <class T, class Work> struct ManyRows {
  const Work& work;
  int64_t dim, width;               // width: dim in whole vectors
  int groups;                       // of kGroup rows
  float *q, *out, *folded;          // [groups, dim, kGroup]
  float* scores;                    // [kTile, kGroup]
  float *keys, *values;             // [dim, kTile], [kTile, width]
  float *max, *total;               // [groups, kGroup], of the current split
  float *folded_max, *folded_total; // [groups, kGroup], of the splits before
  View* views;                      // [groups, kGroup]; those behind the last row see nothing
  int64_t *least, *most;            // [groups]: positions that all rows see, and that none sees from there on

  ManyRows(const Work& of, int64_t head_dim, float scale, float* scratch)
      : work(of), dim(head_dim), width(round_up(head_dim)), groups((work.count + kGroup - 1) / kGroup) {
    Arena arena(scratch);
    const int64_t rows = groups * kGroup;
    q = arena.take(rows * dim);
    out = arena.take(rows * dim);
    folded = arena.take(rows * dim);
    scores = arena.take(kTile * kGroup);
    keys = arena.take(width * kTile);
    values = arena.take(kTile * width);
    max = arena.take(rows);
    total = arena.take(rows);
    folded_max = arena.take(rows);
    folded_total = arena.take(rows);
    views = (View*)arena.take(rows * (int64_t)(sizeof(View) / sizeof(float)));
    least = (int64_t*)arena.take(2 * groups);
    most = (int64_t*)arena.take(2 * groups);
    clear(folded, rows * dim, 0.0f);
    clear(folded_max, rows, -INFINITY);
    clear(folded_total, rows, 0.0f);
    for (int r = 0; r < rows; ++r)
      view_row(r);
    for (int r = 0; r < rows; r += kLanes)
      load_queries(r, scale);
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

  // The place of rows [r, r + kLanes) in q, out or folded, where dimension d is d * kGroup further on.
  float* column(float* of, int r) const { return of + r / kGroup * dim * kGroup + r % kGroup; }

  void load_queries(int r, float scale) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int count = dim - d < kLanes ? (int)(dim - d) : kLanes;
      Vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < work.count ? load(work.query(r + i) + d, count) * scale : Vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < count)
          store(column(q, r) + (d + i) * kGroup, block[i]);
    }
  }

  // All rows against positions [begin, end) of one split.
  void attend(int64_t begin, int64_t end) {
    clear(out, groups * kGroup * dim, 0.0f);
    clear(max, groups * kGroup, -INFINITY);
    clear(total, groups * kGroup, 0.0f);
    const T *key_rows[kTile], *value_rows[kTile];
    for (int64_t start = begin; start < end; start += kTile) {
      const int columns = tile_columns(start, end), next = tile_columns(start + kTile, end);
      work.locate(start, columns, key_rows, value_rows);
      load_transposed(key_rows, columns, dim, keys);
      load_rows(value_rows, columns, dim, values);
      work.locate(start + kTile, next, key_rows, value_rows);
      prefetch_rows(key_rows, next, dim);
      prefetch_rows(value_rows, next, dim);
      for (int group = 0; group < groups; ++group) {
        const int left = work.count - group * kGroup;
        if (left > (kGroupVectors - 1) * kLanes)
          attend_group<kGroupVectors>(group, start, columns);
        else if (left > kLanes)
          attend_group<2>(group, start, columns);
        else
          attend_group<1>(group, start, columns);
      }
    }
  }

  // One group of N vectors of rows against the loaded tile.
  template <int N> void attend_group(int group, int64_t start, int columns) {
    if (start >= most[group])
      return;
    const bool whole = start + kTile <= least[group];
    const float* queries = q + group * kGroup * dim;
    float* sums = out + group * kGroup * dim;
    lane_product<N, false>(keys, kTile, queries, scores, columns, dim, nullptr);
    Vf keep[N];
    for (int n = 0; n < N; ++n) {
      const int r = group * kGroup + n * kLanes;
      if (!whole)
        hide_unseen(r, start, columns);
      keep[n] = weigh(r);
    }
    lane_product<N, true>(values, width, scores, sums, dim, columns, keep);
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

  // Scores of rows [r, r + kLanes) become weights relative to their new maxima; how far these rose is
  // returned.
  KVKEYE_APART Vf weigh(int r) {
    float* column = scores + r % kGroup;
    const Vf before = load(max + r);
    Vf peak[4] = {before, before, before, before};
    for (int j = 0; j < kTile; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        peak[i] = KVKEYE_ISA::max(load(column + (j + i) * kGroup), peak[i]);
    const Vf top = KVKEYE_ISA::max(KVKEYE_ISA::max(peak[0], peak[1]), KVKEYE_ISA::max(peak[2], peak[3]));
    const Vf base = base_of(top), keep = weight_of(before - base);
    Vf part[kLanes]; // of every kLanes-th key, as the lanes of FewRows sum them
    for (int i = 0; i < kLanes; ++i) {
      part[i] = Vf{};
#pragma GCC unroll 4
      for (int j = i; j < kTile; j += kLanes) {
        const Vf weight = weight_of(load(column + j * kGroup) - base);
        store(column + j * kGroup, weight);
        part[i] = part[i] + weight;
      }
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i)
        part[i] = part[i] + part[i + half];
    store(max + r, top);
    store(total + r, fma(load(total + r), keep, part[0]));
    return keep;
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

  // Calls write(r, row) with each row of q, out or folded; `keys` is overwritten.
  template <class Write> void for_rows(float* of, const Write& write) const {
    float* rows = keys; // [kLanes, width]
    for (int r = 0; r < work.count; r += kLanes) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        Vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          block[i] = d + i < dim ? load(column(of, r) + (d + i) * kGroup) : Vf{};
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          store(rows + i * width + d, block[i]);
      }
      for (int i = 0; i < kLanes && r + i < work.count; ++i)
        write(r + i, rows + i * width);
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
