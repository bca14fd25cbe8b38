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

// Where the sums of a product begin: at 0, at c, or at c * keep[lanes].
enum class Begin { zero, add, keep };

// How a factor's rows lie: each together, a(m, k) = a[m * a_row + k], or side by side, a(m, k) = a[k * a_row
// + m].
enum class Walk { rows, columns };

// c[m, lanes] = begin + sum_k a(m, k) b[k, lanes] for M rows of N vectors.
template <class Product, int M, int N, Begin kBegin, Walk kWalk>
KVKEYE_APART void lane_block(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                             int64_t c_row, int64_t depth, const Vf* keep) {
  Vf total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      total[m][n] = kBegin == Begin::zero ? Vf{} : load(c + m * c_row + n * kLanes);
      if (kBegin == Begin::keep)
        total[m][n] = total[m][n] * keep[n];
    }
  for (int64_t k = 0; k < depth; ++k, a += kWalk == Walk::rows ? 1 : a_row, b += b_row) {
    Vf lanes[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      lanes[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf step = splat(kWalk == Walk::rows ? a[m * a_row] : a[m]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        total[m][n] = Product::multiply(step, lanes[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(c + m * c_row + n * kLanes, total[m][n]);
}

// The same for any number of rows of a, with c in rows of kGroup.
template <class Product, int N, Begin kBegin, Walk kWalk, class T>
void lane_product(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t rows,
                  int64_t depth, const Vf* keep, Ahead<T>& ahead) {
  const int64_t a_next = kWalk == Walk::rows ? a_row : 1;
  int64_t i = 0;
  for (; i + kSteps <= rows; i += kSteps) {
    ahead.advance();
    lane_block<Product, kSteps, N, kBegin, kWalk>(a + i * a_next, a_row, b, b_row, c + i * kGroup, kGroup,
                                                  depth, keep);
  }
  for (; i < rows; ++i)
    lane_block<Product, 1, N, kBegin, kWalk>(a + i * a_next, a_row, b, b_row, c + i * kGroup, kGroup, depth,
                                             keep);
}

template <class T, class Work, class Product> struct ManyRows : LaneRows<Work, kGroupVectors, false> {
  using Base = LaneRows<Work, kGroupVectors, false>;
  using Base::dim, Base::groups, Base::max, Base::scores, Base::total, Base::width, Base::work;
  int64_t words;     // of a row
  int64_t key_width; // words in whole vectors
  float unit;        // of the scores
  float* q;          // [groups, words, kGroup]
  float* keys;       // [kSplitPositions, key_width]
  float* values;     // [kSplitPositions / per_word, width]

  ManyRows(const Work& of, int64_t head_dim, float softmax_scale, Arena arena)
      : Base(of, head_dim, arena), words(words_of<Product>(head_dim)), key_width(round_up(words)),
        unit(Product::unit_of(softmax_scale * kLog2E)) {
    q = arena.take(groups * kGroup * words);
    keys = arena.take(kSplitPositions * key_width);
    values = arena.take(kSplitPositions / Product::per_word * width);
    for (int r = 0; r < groups * kGroup; r += kLanes)
      load_queries(r, softmax_scale * kLog2E);
  }

  void load_queries(int r, float scale) {
    for (int64_t w = 0; w < words; w += kLanes) {
      Vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int row = this->row_of(r + i);
        block[i] = row >= 0 ? Product::load_query(work.query(row), w, dim, scale) : Vf{};
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (w + i < words)
          store(q + r / kGroup * words * kGroup + r % kGroup + (w + i) * kGroup, block[i]);
    }
  }

  // All rows against positions [begin, end) of one split. Its tiles are loaded once, as the first group that
  // sees them comes by, and stay for the others; the next tile, up to position `last`, is read ahead
  // meanwhile.
  void attend(int64_t begin, int64_t end, int64_t last, bool partial) {
    int64_t loaded = begin;
    for (int group = 0; group < groups; ++group) {
      this->begin_split();
      const int64_t seen = this->most[group] < end ? this->most[group] : end;
      for (int64_t start = begin; start < seen; start += kTile) {
        const T* rows[2 * kTile]; // of keys, then of values
        Ahead<T> ahead{rows, 0, 0, dim};
        const int columns = tile_columns(start, end);
        if (start >= loaded) {
          bring(start - begin, start, columns, rows);
          loaded = start + kTile;
          const int next = locate_ahead(work, loaded, last, rows, rows + kTile);
          std::memmove(rows + next, rows + kTile, next * sizeof *rows);
          ahead.left = 2 * next;
          ahead.step = ahead.left / (int)((columns + dim) / kSteps + 1) + 1;
        }
        if (this->vectors(group) == 3)
          attend_tile<kGroupVectors>(group, start - begin, start, columns, ahead);
        else if (this->vectors(group) == 2)
          attend_tile<2>(group, start - begin, start, columns, ahead);
        else
          attend_tile<1>(group, start - begin, start, columns, ahead);
      }
      this->close(group, partial);
    }
  }

  // The tile at `start`, into place `at` of the split.
  void bring(int64_t at, int64_t start, int columns, const T** rows) {
    work.locate(start, columns, rows, rows + columns);
    load_tile<Product>(rows, columns, dim, keys + at * key_width, key_width);
    Product::load_values(rows + columns, columns, dim, values + at / Product::per_word * width);
  }

  // One group of N vectors of rows against one tile.
  template <int N> void attend_tile(int group, int64_t at, int64_t start, int columns, Ahead<T>& ahead) {
    const bool whole = start + kTile <= this->least[group];
    const float* queries = q + group * kGroup * words;
    lane_product<Product, N, Begin::zero, Walk::rows>(keys + at * key_width, key_width, queries, kGroup,
                                                      scores, columns, words, nullptr, ahead);
    Vf keep[N];
    for (int n = 0; n < N; ++n) {
      if (!whole)
        this->hide_unseen(group * kGroup + n * kLanes, start, columns);
      keep[n] = weigh(n * kLanes);
    }
    lane_product<Product, N, Begin::keep, Walk::columns>(values + at / Product::per_word * width, width,
                                                         scores, Product::per_word * kGroup, this->out, dim,
                                                         words_of<Product>(columns), keep, ahead);
  }

  // Scores of rows [r, r + kLanes) of the group become weights relative to their new maxima; how far these
  // rose is returned.
  KVKEYE_APART Vf weigh(int r) {
    float* column = scores + r;
    const Vf before = load(max + r), scale = splat(unit);
    Vf peak[4];
    for (int i = 0; i < 4; ++i)
      peak[i] = splat(-INFINITY);
    for (int j = 0; j < kTile; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        peak[i] = KVKEYE_ISA::max(load(column + (j + i) * kGroup), peak[i]);
    const Vf found = KVKEYE_ISA::max(KVKEYE_ISA::max(peak[0], peak[1]), KVKEYE_ISA::max(peak[2], peak[3]));
    const Vf top = KVKEYE_ISA::max(found * scale, before);
    const Vf base = base_of(top), keep = weight_of(before - base);
    Vf part[kLanes]; // of every kLanes-th key, as the lanes of FewRows sum them
    for (int i = 0; i < kLanes; i += 2) {
      Vf even{}, odd{};
#pragma GCC unroll 4
      for (int j = i; j < kTile; j += kLanes) {
        const Vf first = weight_of(fma(load(column + j * kGroup), scale, -base));
        const Vf second = weight_of(fma(load(column + (j + 1) * kGroup), scale, -base));
        Product::store_weights(column + j * kGroup, kGroup, first, second);
        even = even + first;
        odd = odd + second;
      }
      part[i] = even;
      part[i + 1] = odd;
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
