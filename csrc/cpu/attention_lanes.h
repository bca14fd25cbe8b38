// Attention of many query rows: the rows lie in the lanes.
//
// Queries are transposed once and keys and values broadcast as they are, so a score tile, its maximum and its
// sum go down the lanes without a shuffle, and a head of 72 is 72 steps.
#pragma once

#include "attention_lane_rows.h"

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

template <class T, class Work> struct ManyRows : LaneRows<Work, kGroupVectors> {
  using Base = LaneRows<Work, kGroupVectors>;
  using Base::dim, Base::groups, Base::max, Base::scores, Base::total, Base::width, Base::work;
  float* q;      // [groups, width, kGroup]
  float* keys;   // [dim, kTile]
  float* values; // [kTile, width]

  ManyRows(const Work& of, int64_t head_dim, float scale, Arena arena) : Base(of, head_dim, arena) {
    q = arena.take(groups * kGroup * width);
    keys = arena.take(width * kTile);
    values = arena.take(kTile * width);
    for (int r = 0; r < groups * kGroup; r += kLanes)
      load_queries(r, scale * kLog2E);
  }

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
          store(this->column(q, r) + (d + i) * kGroup, block[i]);
    }
  }

  // All rows against positions [begin, end) of one split.
  void attend(int64_t begin, int64_t end) {
    this->begin_split();
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
        if (this->vectors(group) == 3)
          attend_group<kGroupVectors>(group, start, columns);
        else if (this->vectors(group) == 2)
          attend_group<2>(group, start, columns);
        else
          attend_group<1>(group, start, columns);
      }
    }
  }

  // One group of N vectors of rows against the loaded tile.
  template <int N> void attend_group(int group, int64_t start, int columns) {
    if (start >= this->most[group])
      return;
    const bool whole = start + kTile <= this->least[group];
    const float* queries = q + group * kGroup * width;
    float* sums = this->out + group * kGroup * width;
    lane_product<N, false>(keys, kTile, queries, scores, columns, dim, nullptr);
    Vf keep[N];
    for (int n = 0; n < N; ++n) {
      const int r = group * kGroup + n * kLanes;
      if (!whole)
        this->hide_unseen(r, start, columns);
      keep[n] = weigh(r);
    }
    lane_product<N, true>(values, round_up(dim), scores, sums, dim, columns, keep);
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
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
