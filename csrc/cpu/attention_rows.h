// Attention of a few query rows: keys, and then the head's dimensions, lie in the lanes.
//
// A decoded token has only the heads of one group to share a key with, which would leave lanes of rows empty.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kFewRows = 8;

// A vector of a key: fp32, or pairs of bf16 of which the lower comes first.
template <class T> constexpr int kPerWord = 4 / (int)sizeof(T);

template <class T> KVKEYE_INLINE Vf load_raw(const T* source) {
  Vf words;
  std::memcpy(&words, source, sizeof words);
  return words;
}

// The first `count` elements, and zeros.
template <class T> KVKEYE_INLINE Vf load_raw(const T* source, int64_t count) {
  T elements[kPerWord<T> * kLanes] = {};
  for (int64_t i = 0; i < count; ++i)
    elements[i] = source[i];
  return load_raw(elements);
}

template <int kPart> KVKEYE_INLINE Vf half_of(Vf pairs) {
  return kPart == 0 ? (Vf)((Vu)pairs << 16) : (Vf)((Vu)pairs & 0xffff0000u);
}

// total[m][lane] += sum_d q[m, d] words[lane], d: as many dimensions as a vector of words holds.
template <class Product, int M, class T>
KVKEYE_INLINE void add_scores(const float* q, int64_t q_row, Vf (&words)[kLanes], Vf (&total)[M]) {
  constexpr bool halves = kPerWord<T> == 2 && Product::per_word == 1;
  transpose(words);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i, q += halves ? 2 : 1) {
    const Vf first = halves ? half_of<0>(words[i]) : words[i];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      total[m] = Product::multiply(splat(q[m * q_row]), first, total[m]);
    if constexpr (halves) {
      const Vf second = half_of<1>(words[i]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[m] = Product::multiply(splat(q[m * q_row + 1]), second, total[m]);
    }
  }
}

// scores[m, j] = sum_d q[m, d] keys[j][d] for M rows and the keys of a tile, kLanes of which are transposed
// in registers at a time. Dimensions go around keys, so that a core need not wait for a sum to reach its next
// step. `next` is read ahead, in the order of addresses.
template <class Product, int M, class T>
KVKEYE_APART void score_keys(const float* q, int64_t q_row, const T* const* keys, const T* const* next,
                             int columns, int64_t dim, float* scores) {
  constexpr int64_t step = kPerWord<T> * kLanes;
  const int blocks = (int)((dim + step - 1) / step) * ((columns + kLanes - 1) / kLanes);
  int asked = 0, block = 0;
  for (int64_t d = 0; d < dim; d += step)
    for (int j = 0; j < columns; j += kLanes) {
      const int ask = kTile * ++block / blocks;
      prefetch_rows(next + asked, ask - asked, dim);
      asked = ask;
      Vf total[M], words[kLanes];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[m] = d == 0 ? Vf{} : load(scores + m * kTile + j);
      if (d + step <= dim)
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          words[i] = load_raw(keys[j + i] + d);
      else
        for (int i = 0; i < kLanes; ++i)
          words[i] = load_raw(keys[j + i] + d, dim - d);
      add_scores<Product, M, T>(q + d / Product::per_word, q_row, words, total);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        store(scores + m * kTile + j, total[m]);
    }
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

#if defined(__AVX512BF16__)
// The same in pairs of keys, for 32 N dimensions of which the last vector has dim - d - 32 (N - 1).
template <int M, int N>
KVKEYE_APART void add_value_pairs(const float* weights, const bf16* const* values, const bf16* const* next,
                                  int count, int64_t d, int64_t dim, float* out, int64_t out_row) {
  Vf total[M][2 * N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n)
      total[m][n] = load(out + m * out_row + d + n * kLanes);
  const auto words = [&](const bf16* row, int n) KVKEYE_LAMBDA {
    return N > 1 ? load_raw(row + d + n * 32) : Paired::load_words(row, d / 2, dim);
  };
  for (int j = 0; j < count; j += 2) {
    const bool both = j + 1 < count;
    Vf value[2 * N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(next[j] + d + n * 32, 0, 2);
      __builtin_prefetch(next[j + both] + d + n * 32, 0, 2);
      Paired::interleave(words(values[j], n), both ? words(values[j + 1], n) : Vf{}, value[2 * n],
                         value[2 * n + 1]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf weight = splat(weights[m * kTile + j / 2]);
#pragma GCC unroll 8
      for (int n = 0; n < 2 * N; ++n)
        total[m][n] = Paired::multiply(weight, value[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < 2 * N; ++n)
      store(out + m * out_row + d + n * kLanes, total[m][n]);
}
#endif

template <class Product, int M, class T>
void add_value_rows(const float* weights, const T* const* values, const T* const* next, int count,
                    int64_t dim, float* out, int64_t out_row) {
#if defined(__AVX512BF16__)
  if constexpr (Product::per_word == 2) {
    constexpr int wide = M > 4 ? 1 : M > 2 ? 2 : 4; // at most 16 sums
    int64_t d = 0;
    for (; d + wide * 32 <= dim; d += wide * 32)
      add_value_pairs<M, wide>(weights, values, next, count, d, dim, out, out_row);
    for (; d < dim; d += 32)
      add_value_pairs<M, 1>(weights, values, next, count, d, dim, out, out_row);
    return;
  }
#endif
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

template <class T, class Work, class Product> struct FewRows {
  const Work& work;
  int64_t dim, width;               // width: dim in whole vectors, an even number of them
  float unit;                       // of the scores
  float *q, *out, *folded;          // [kFewRows, width]
  float* scores;                    // [kFewRows, kTile]
  float *max, *total;               // [kFewRows], of the current split
  float *folded_max, *folded_total; // [kFewRows], of the splits before
  int64_t seen[kFewRows];

  FewRows(const Work& of, int64_t head_dim, float softmax_scale, Arena arena)
      : work(of), dim(head_dim), width((head_dim + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes)),
        unit(Product::unit_of(softmax_scale * kLog2E)) {
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
      for (int64_t w = 0; w < words_of<Product>(dim); w += kLanes)
        store(q + r * width + w, Product::load_query(work.query(r), w, dim, softmax_scale * kLog2E));
      seen[r] = work.seen(r);
    }
  }

  // All rows against positions [begin, end) of one split; what comes next, up to position `last`, is read
  // ahead.
  void attend(int64_t begin, int64_t end, int64_t last, bool partial) {
    clear(out, work.count * width, 0.0f);
    clear(max, kRowVector, -INFINITY);
    clear(total, kRowVector, 0.0f);
    Located tiles[2];
    tiles[0].locate(work, begin, end);
    for (int64_t start = begin; start < end; start += kTile) {
      const int columns = tile_columns(start, end), at = (start - begin) / kTile % 2;
      const Located &tile = tiles[at], &next = tiles[1 - at];
      if (!tiles[1 - at].locate(work, start + kTile, last))
        tiles[1 - at] = tile;
      with_count(work.count, [&](auto rows) KVKEYE_LAMBDA {
        score_keys<Product, rows.value>(q, width, tile.keys, next.keys, columns, dim, scores);
      });
      for (int r = 0; r < work.count; ++r)
        weigh(r, start, columns);
      with_count(work.count, [&](auto rows) KVKEYE_LAMBDA {
        add_value_rows<Product, rows.value>(scores, tile.values, next.values, columns, dim, out, width);
      });
    }
    if (partial)
      store_partial();
    else
      fold();
  }

  // The rows of one tile; behind the last, that one again.
  struct Located {
    const T* keys[kTile];
    const T* values[kTile];

    bool locate(const Work& work, int64_t start, int64_t last) {
      const int columns = locate_ahead(work, start, last, keys, values);
      for (int j = columns; columns > 0 && j < kTile; ++j) {
        keys[j] = keys[columns - 1];
        values[j] = values[columns - 1];
      }
      return columns > 0;
    }
  };

  // Scores of one row become weights relative to its new maximum; what was summed before is rescaled.
  void weigh(int r, int64_t start, int columns) {
    float *row = scores + r * kTile, *sums = out + r * width;
    const int own = seen_columns(seen[r], start, columns);
    if (own == 0)
      return clear(row, kTile, 0.0f);
    Vf peak = splat(-INFINITY);
    for (int i = 0; i < kTile; i += kLanes) {
      const Vf score = load(row + i), kept = own == kTile ? score : first_lanes(score, own - i);
      store(row + i, kept);
      peak = KVKEYE_ISA::max(kept, peak);
    }
    const Vf before = splat(max[r]), top = KVKEYE_ISA::max(splat(largest(peak) * unit), before);
    const Vf base = base_of(top), keep = weight_of(before - base);
    Vf part{};
    for (int i = 0; i < kTile; i += 2 * kLanes) {
      const Vf first = weight_of(fma(load(row + i), splat(unit), -base));
      const Vf second = weight_of(fma(load(row + i + kLanes), splat(unit), -base));
      Product::store_row_weights(row + i / Product::per_word, first, second);
      part = part + first + second;
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
