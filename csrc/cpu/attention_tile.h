// What the attention kernels share: tiles of keys and values in fp32, one small matrix product, the online
// softmax.
//
// Keys are transposed so that a score tile is rows times 64 columns of lanes; each element of a product is
// one chain of multiply-adds over its depth, whatever the tile it is computed in.
#pragma once

#include "kvkeye/attention.h"
#include "kvkeye/common/simd.h"

#include <math.h>

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kTile = (int)kTilePositions;

KVKEYE_INLINE int64_t round_up(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// Hands out aligned pieces of the scratch memory.
struct Arena {
  float* next;
  explicit Arena(float* memory) : next((float*)(((uintptr_t)memory + 63) & ~(uintptr_t)63)) {}
  float* take(int64_t floats) {
    float* piece = next;
    next += (floats + 15) / 16 * 16;
    return piece;
  }
};

// The matrix product.

// An element (i, k) is at data[i * row + k * column].
struct Factor {
  const float* data;
  int64_t row, column;
};

template <int M, int N, bool kAdd>
KVKEYE_INLINE void multiply_block(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                                  int64_t depth) {
  Vf total[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      total[m][n] = kAdd ? load(c + m * c_row + n * kLanes) : Vf{};
  for (int64_t k = 0; k < depth; ++k) {
    Vf column[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      column[n] = load(b + k * b_row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf row = splat(a.data[m * a.row + k * a.column]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        total[m][n] = fma(row, column[n], total[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      store(c + m * c_row + n * kLanes, total[m][n]);
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 6; // times 4 vectors: 24 sums, 4 columns and 1 row in 32 registers
#else
constexpr int kBlockRows = 2; // times 4 vectors: 8 sums, 4 columns and 1 row in 16 registers
#endif

template <int N, bool kAdd>
void multiply_strip(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows,
                    int64_t depth) {
  int64_t i = 0;
  const auto advance = [&](int count) {
    i += count;
    a.data += count * a.row;
    c += count * c_row;
  };
  for (; i + kBlockRows <= rows; advance(kBlockRows))
    multiply_block<kBlockRows, N, kAdd>(a, b, b_row, c, c_row, depth);
  if (kBlockRows > 4 && i + 4 <= rows) {
    multiply_block<4, N, kAdd>(a, b, b_row, c, c_row, depth);
    advance(4);
  }
  if (kBlockRows > 2 && i + 2 <= rows) {
    multiply_block<2, N, kAdd>(a, b, b_row, c, c_row, depth);
    advance(2);
  }
  if (i < rows)
    multiply_block<1, N, kAdd>(a, b, b_row, c, c_row, depth);
}

// c[i, n] (+)= sum_k a[i, k] b[k, n] for i < rows and n < columns, a multiple of the vector.
template <bool kAdd>
void multiply(Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t rows, int64_t depth,
              int64_t columns) {
  for (int64_t left = columns / kLanes; left > 0;) {
    const int width = left == 5 || left == 6 ? 3
                      : left < 4             ? (int)left
                                             : 4; // 5 = 3 + 2 keeps more sums busy than 4 + 1
    switch (width) {
    case 1:
      multiply_strip<1, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    case 2:
      multiply_strip<2, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    case 3:
      multiply_strip<3, kAdd>(a, b, b_row, c, c_row, rows, depth);
      break;
    default:
      multiply_strip<4, kAdd>(a, b, b_row, c, c_row, rows, depth);
    }
    left -= width;
    b += width * kLanes;
    c += width * kLanes;
  }
}

// Tiles.

KVKEYE_INLINE void interleave(Vf a, Vf b, Vf& low, Vf& high) {
#if defined(__AVX512F__)
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Interleaving the first half of the rows with the second transposes after log2(lanes) rounds.
KVKEYE_INLINE void transpose(Vf (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vf next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      rows[i] = next[i];
  }
}

// target[d, j] = rows[j][d], target [dim, kTile]; columns from count to the next whole vector are zero.
template <class T> void load_transposed(const T* const* rows, int count, int64_t dim, float* target) {
  for (int j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int width = dim - d < kLanes ? (int)(dim - d) : kLanes;
      Vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = j + i < count ? load(rows[j + i] + d, width) : Vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < width)
          store(target + (d + i) * kTile + j, block[i]);
    }
  }
}

// One row in fp32, zero from dim to the next whole vector.
template <class T> KVKEYE_INLINE void load_row(const T* source, int64_t dim, float* target) {
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes)); });
}

template <class T> void load_rows(const T* const* rows, int count, int64_t dim, float* target) {
  for (int j = 0; j < count; ++j)
    load_row(rows[j], dim, target + j * round_up(dim));
}

// What a row sees.

// Positions [0, prefix), and position prefix + j where bit j is set.
struct View {
  int64_t prefix;
  uint64_t bits;
};

// Bit j is set if the row sees position start + j.
KVKEYE_INLINE uint64_t visible(const View& view, int64_t start) {
  const int64_t before = view.prefix - start;
  if (before >= 64)
    return ~(uint64_t)0;
  if (before >= 0)
    return (((uint64_t)1 << before) - 1) | view.bits << before;
  return before > -64 ? view.bits >> -before : 0;
}

KVKEYE_INLINE Vf hide(Vf value, uint64_t seen, int first, float hidden) {
  Vu lane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    lane[i] = (uint32_t)i;
  const Vu bit = ((Vu{} + (uint32_t)(seen >> first)) >> lane) & 1u;
  return bit != 0 ? value : splat(hidden);
}

// The online softmax.

// exp(x) for x <= 0, with 0 below e^-87: a result that underflows, as each hidden score would, traps into
// microcode.
KVKEYE_INLINE Vf weight_of(Vf x) {
  const Vf least = splat(-87.0f);
  return x < least ? Vf{} : exp(max(least, x));
}

// One row's softmax so far: out is relative to exp(max), total the sum of the weights.
struct State {
  float* out; // [round_up(dim)]
  float max, total;
};

// Adds the state of a later split. Exact when one of the two is empty.
KVKEYE_INLINE void fold(State& state, const float* out, float max, float total, int64_t dim) {
  if (total == 0.0f) // nothing seen; a NaN goes on
    return;
  const float top = state.max > max ? state.max : max;
  const float keep = weight_of(splat(state.max - top))[0], add = weight_of(splat(max - top))[0];
  state.max = top;
  state.total = keep * state.total + add * total;
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf sum = fma(load(out + i, lanes), splat(add), load(state.out + i, lanes) * keep);
    store(state.out + i, sum, lanes);
  });
}

template <class T> KVKEYE_INLINE void finish(const State& state, int64_t dim, T* o, float* lse) {
  const float scale = state.total == 0.0f ? 0.0f : 1.0f / state.total;
  for_vectors(dim, [&](int64_t i, int lanes)
                       KVKEYE_LAMBDA { store(o + i, load(state.out + i, lanes) * scale, lanes); });
  *lse = state.total == 0.0f ? -INFINITY : state.max + logf(state.total);
}

// Rows of one query tile at work.
struct Rows {
  int count;
  int64_t dim, width;               // width: dim in whole vectors
  float *q, *out, *folded;          // [count, width]
  float* scores;                    // [count, kTile]
  float* keys;                      // [dim, kTile]
  float* values;                    // [kTile, width]
  float *max, *top, *keep;          // [count]: maximum before and after a tile, exp(before - after)
  float *folded_max, *folded_total; // [count]
  float* total;                     // [count, kLanes]: the lanes are added at the end
  View* views;                      // [count]

  Rows(float* scratch, int64_t capacity, int64_t head_dim)
      : count(0), dim(head_dim), width(round_up(head_dim)) {
    Arena arena(scratch);
    q = arena.take(capacity * width);
    out = arena.take(capacity * width);
    folded = arena.take(capacity * width);
    scores = arena.take(capacity * kTile);
    keys = arena.take(dim * kTile);
    values = arena.take(kTile * width);
    max = arena.take(capacity);
    top = arena.take(capacity);
    keep = arena.take(capacity);
    folded_max = arena.take(capacity);
    folded_total = arena.take(capacity);
    total = arena.take(capacity * kLanes);
    views = (View*)arena.take(capacity * (int64_t)(sizeof(View) / sizeof(float)));
  }
};

KVKEYE_INLINE void clear(float* target, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i)
    target[i] = value;
}

// Scales the scores of one row, hides what it does not see, and finds its new maximum.
KVKEYE_INLINE void bound_row(Rows& rows, int r, int64_t start, int columns, float scale) {
  float* row = rows.scores + r * kTile;
  const uint64_t all = columns == 64 ? ~(uint64_t)0 : ((uint64_t)1 << columns) - 1;
  const uint64_t seen = visible(rows.views[r], start) & all;
  const bool whole = seen == all && columns % kLanes == 0;
  Vf peak = splat(rows.max[r]);
  for (int i = 0; i < columns; i += kLanes) {
    const Vf score = load(row + i) * scale;
    const Vf kept = whole ? score : hide(score, seen, i, -INFINITY);
    store(row + i, kept);
    peak = max(kept, peak);
  }
  rows.top[r] = largest(peak);
}

// Scores of one row become weights relative to its maximum; what was summed before is rescaled.
KVKEYE_INLINE void weigh_row(Rows& rows, int r, int columns) {
  float *row = rows.scores + r * kTile, *out = rows.out + r * rows.width;
  const Vf keep = splat(rows.keep[r]);
  const float base = rows.max[r] == -INFINITY ? 0.0f : rows.max[r];
  Vf total = load(rows.total + r * kLanes) * keep;
  for (int i = 0; i < columns; i += kLanes) {
    const Vf weight = weight_of(load(row + i) - base);
    store(row + i, weight);
    total = total + weight;
  }
  store(rows.total + r * kLanes, total);
  for (int64_t i = 0; i < rows.width; i += kLanes)
    store(out + i, load(out + i) * keep);
}

// One step of the online softmax for the rows from `first`, a multiple of the vector. Row by row it would
// wait for each maximum and its exponential.
KVKEYE_INLINE void weigh(Rows& rows, int first, int64_t start, int columns, float scale) {
  for (int r = first; r < rows.count; ++r)
    bound_row(rows, r, start, columns, scale);
  for (int r = first; r < rows.count; r += kLanes) {
    const Vf top = load(rows.top + r);
    store(rows.keep + r, weight_of(load(rows.max + r) - (top == -INFINITY ? Vf{} : top)));
    store(rows.max + r, top);
  }
  for (int r = first; r < rows.count; ++r)
    weigh_row(rows, r, columns);
}

// Where the rows begin that see something of a tile, in whole vectors. Causal rows before it would gain
// nothing.
KVKEYE_INLINE int first_seeing(const Rows& rows, int64_t start) {
  int first = 0;
  while (first < rows.count && visible(rows.views[first], start) == 0)
    ++first;
  return first / kLanes * kLanes;
}

// Attention of all rows to positions [begin, end) of one split. locate(start, count, keys, values) names the
// rows of keys and values at positions [start, start + count).
template <class T, class Locate>
void attend_split(Rows& rows, int64_t begin, int64_t end, float scale, const Locate& locate) {
  clear(rows.out, rows.count * rows.width, 0.0f);
  clear(rows.total, rows.count * kLanes, 0.0f);
  clear(rows.max, rows.count, -INFINITY);
  const T *keys[kTile], *values[kTile];
  for (int64_t start = begin; start < end; start += kTile) {
    const int columns = end - start < kTile ? (int)(end - start) : kTile;
    locate(start, columns, keys, values);
    load_transposed(keys, columns, rows.dim, rows.keys);
    load_rows(values, columns, rows.dim, rows.values);
    const int first = first_seeing(rows, start), count = rows.count - first;
    float *scores = rows.scores + first * kTile, *out = rows.out + first * rows.width;
    multiply<false>({rows.q + first * rows.width, rows.width, 1}, rows.keys, kTile, scores, kTile, count,
                    rows.dim, round_up(columns));
    weigh(rows, first, start, columns, scale);
    multiply<true>({scores, kTile, 1}, rows.values, rows.width, out, rows.width, count, columns, rows.width);
  }
}

// Attention of all rows to positions [0, end): the splits in order. target(r, o, lse) names where row r goes.
template <class T, class Locate, class Target>
void attend(Rows& rows, int64_t end, float scale, const Locate& locate, const Target& target) {
  clear(rows.folded, rows.count * rows.width, 0.0f);
  clear(rows.folded_total, rows.count, 0.0f);
  clear(rows.folded_max, rows.count, -INFINITY);
  for (int64_t begin = 0; begin < end; begin += kSplitPositions) {
    attend_split<T>(rows, begin, end - begin < kSplitPositions ? end : begin + kSplitPositions, scale,
                    locate);
    for (int r = 0; r < rows.count; ++r) {
      State state{rows.folded + r * rows.width, rows.folded_max[r], rows.folded_total[r]};
      fold(state, rows.out + r * rows.width, rows.max[r], sum(load(rows.total + r * kLanes)), rows.dim);
      rows.folded_max[r] = state.max;
      rows.folded_total[r] = state.total;
    }
  }
  for (int r = 0; r < rows.count; ++r) {
    T* o;
    float* lse;
    target(r, o, lse);
    finish({rows.folded + r * rows.width, rows.folded_max[r], rows.folded_total[r]}, rows.dim, o, lse);
  }
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
