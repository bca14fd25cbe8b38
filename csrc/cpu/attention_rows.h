// Attention of a few query rows: keys, and then the head's dimensions, lie in the lanes.
//
// A decoded token has only the heads of one group to share a key with, which would leave lanes of rows empty.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kFewRows = 8;

// A word of a key: one fp32, or two bf16 of which the lower comes first.
template <class T> constexpr int kPerWord = 4 / (int)sizeof(T);

template <class T> KVKEYE_INLINE Vf load_words(const T* source) {
  Vf words;
  std::memcpy(&words, source, sizeof words);
  return words;
}

// The first `count` elements, and zeros.
template <class T> KVKEYE_INLINE Vf load_words(const T* source, int64_t count) {
  T elements[kPerWord<T> * kLanes] = {};
  for (int64_t i = 0; i < count; ++i)
    elements[i] = source[i];
  return load_words(elements);
}

template <class T, int kPart> KVKEYE_INLINE Vf part_of(Vf words) {
  if (sizeof(T) == 4)
    return words;
  return kPart == 0 ? (Vf)((Vu)words << 16) : (Vf)((Vu)words & 0xffff0000u);
}

// total[m][lane] += sum_d q[m, d] words[lane], d: as many dimensions as a vector of words holds.
template <int M, class T>
KVKEYE_INLINE void add_scores(const float* q, int64_t q_row, Vf (&words)[kLanes], Vf (&total)[M]) {
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i, q += kPerWord<T>) {
    const Vf first = part_of<T, 0>(words[i]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      total[m] = fma(splat(q[m * q_row]), first, total[m]);
    if constexpr (kPerWord<T> == 2) {
      const Vf second = part_of<T, 1>(words[i]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[m] = fma(splat(q[m * q_row + 1]), second, total[m]);
    }
  }
}

// scores[m, j] = sum_d q[m, d] keys[j][d] for M rows and kLanes keys, which are transposed in registers.
// `next` is read ahead.
template <int M, class T>
KVKEYE_APART void score_keys(const float* q, int64_t q_row, const T* const* keys, const T* const* next,
                             int64_t dim, float* scores) {
  constexpr int64_t step = kPerWord<T> * kLanes;
  Vf total[M] = {}, words[kLanes];
  int64_t d = 0;
  for (; d + step <= dim; d += step) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      words[i] = load_words(keys[i] + d);
      __builtin_prefetch(next[i] + d, 0, 2);
    }
    add_scores<M, T>(q + d, q_row, words, total);
  }
  if (d < dim) {
    for (int i = 0; i < kLanes; ++i)
      words[i] = load_words(keys[i] + d, dim - d);
    add_scores<M, T>(q + d, q_row, words, total);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    store(scores + m * kTile, total[m]);
}

// out[m, d] += sum_j weights[m, j] values[j][d] for M rows and N vectors of dimensions from d, of which the
// last has `lanes`; `next` is read ahead.
template <int M, int N, class T>
KVKEYE_APART void add_values(const float* weights, const T* const* values, const T* const* next, int count,
                             int64_t d, int lanes, float* out, int64_t out_row) {
  Vf total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      total[m][n] = load(out + m * out_row + d + n * kLanes);
  for (int j = 0; j < count; ++j) {
    Vf value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n += 64 / (int)sizeof(T) / kLanes)
      __builtin_prefetch(next[j] + d + n * kLanes, 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      value[n] = N > 1 ? load(values[j] + d + n * kLanes) : load(values[j] + d, lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf weight = splat(weights[m * kTile + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        total[m][n] = fma(weight, value[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(out + m * out_row + d + n * kLanes, total[m][n]);
}

template <int M, class T>
void add_value_rows(const float* weights, const T* const* values, const T* const* next, int count,
                    int64_t dim, float* out, int64_t out_row) {
  constexpr int wide = M > 4 || kLanes < 16 ? 2 : 4; // at most 16 sums
  int64_t d = 0;
  for (; d + wide * kLanes <= dim; d += wide * kLanes)
    add_values<M, wide>(weights, values, next, count, d, kLanes, out, out_row);
  for (; d < dim; d += kLanes)
    add_values<M, 1>(weights, values, next, count, d, dim - d < kLanes ? (int)(dim - d) : kLanes, out,
                     out_row);
}

// Calls body with an integral constant: rows, from 1 to kFewRows.
template <int M> struct Count {
  static constexpr int value = M;
};
template <int M = 1, class Body> KVKEYE_INLINE void with_count(int rows, const Body& body) {
  if constexpr (M < kFewRows)
    if (rows > M)
      return with_count<M + 1>(rows, body);
  body(Count<M>{});
}

template <class T, class Work> struct FewRows {
  const Work& work;
  int64_t dim, width;               // width: dim in whole vectors, an even number of them
  float *q, *out, *folded;          // [kFewRows, width]
  float* scores;                    // [kFewRows, kTile]
  float *max, *total;               // [kFewRows], of the current split
  float *folded_max, *folded_total; // [kFewRows], of the splits before
  View views[kFewRows];

  FewRows(const Work& of, int64_t head_dim, float scale, Arena arena)
      : work(of), dim(head_dim), width((head_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes)) {
    q = arena.take(kFewRows * width);
    out = arena.take(kFewRows * width);
    folded = arena.take(kFewRows * width);
    scores = arena.take(kFewRows * kTile);
    max = arena.take(kRowVector);
    total = arena.take(kRowVector);
    folded_max = arena.take(kRowVector);
    folded_total = arena.take(kRowVector);
    clear(q, work.count * width, 0.0f);
    clear(folded, work.count * width, 0.0f);
    clear(folded_max, kRowVector, -INFINITY);
    clear(folded_total, kRowVector, 0.0f);
    for (int r = 0; r < work.count; ++r) {
      load_row(work.query(r), dim, q + r * width);
      for (int64_t i = r * width; i < (r + 1) * width; i += kLanes)
        store(q + i, load(q + i) * (scale * kLog2E));
      views[r] = work.view(r);
    }
  }

  // All rows against positions [begin, end) of one split.
  void attend(int64_t begin, int64_t end) {
    clear(out, work.count * width, 0.0f);
    clear(max, kRowVector, -INFINITY);
    clear(total, kRowVector, 0.0f);
    Located tiles[2];
    locate(begin, end, tiles[0]);
    for (int64_t start = begin; start < end; start += kTile) {
      const int columns = tile_columns(start, end), at = (start - begin) / kTile % 2;
      const Located &tile = tiles[at], &next = tiles[1 - at];
      if (!locate(start + kTile, end, tiles[1 - at]))
        tiles[1 - at] = tile;
      with_count(work.count, [&](auto rows) KVKEYE_LAMBDA {
        for (int j = 0; j < columns; j += kLanes)
          score_keys<rows.value>(q, width, tile.keys + j, next.keys + j, dim, scores + j);
      });
      for (int r = 0; r < work.count; ++r)
        weigh(r, start, columns);
      with_count(work.count, [&](auto rows) KVKEYE_LAMBDA {
        add_value_rows<rows.value>(scores, tile.values, next.values, columns, dim, out, width);
      });
    }
  }

  // The rows of one tile; behind the last, that one again.
  struct Located {
    const T *keys[kTile], *values[kTile];
  };

  bool locate(int64_t start, int64_t end, Located& tile) const {
    const int columns = tile_columns(start, end);
    work.locate(start, columns, tile.keys, tile.values);
    for (int j = columns; j > 0 && j < kTile; ++j) {
      tile.keys[j] = tile.keys[j - 1];
      tile.values[j] = tile.values[j - 1];
    }
    return columns > 0;
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
