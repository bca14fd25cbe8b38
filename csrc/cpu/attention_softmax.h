// The online softmax: weights, and the state that splits leave behind.
//
// Scores and maxima are in units of log2: queries are multiplied by log2(e) beside the softmax scale.
#pragma once

#include "attention_product.h"

#include <math.h>

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kRowVector = 16; // rows of a vector, of any instruction set
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Positions of the tile at `start` before `end`; none where it starts behind the end.
KVKEYE_INLINE int tile_columns(int64_t start, int64_t end) {
  return end - start < kTile ? (end > start ? (int)(end - start) : 0) : kTile;
}

// Of the `columns` positions of the tile at `start` those that a row sees: the first ones.
KVKEYE_INLINE int seen_columns(int64_t seen, int64_t start, int columns) {
  return tile_columns(start, seen < start + columns ? seen : start + columns);
}

// The first `count` lanes, -inf in the others.
KVKEYE_INLINE Vf first_lanes(Vf value, int count) {
  Vi lane;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    lane[i] = i;
  return lane < count ? value : splat(-INFINITY);
}

// Weights.

// 2^x for x <= 0, and 0 below 2^-126: a subnormal result, as each hidden score would give, traps into
// microcode. x = n + r with |r| <= 1/2 and the polynomial of least relative error (2e-9) with value 1 at 0.
KVKEYE_INLINE Vf weight_of(Vf x) {
#if !defined(__AVX512F__)
  const Vf given = x;
  x = max(splat(-126.0f), x);
#endif
  const Vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  const Vf n = (x + magic) - magic, r = x - n;
  Vf p = fma(splat(1.5345812e-4f), r, splat(1.3399931e-3f));
  p = fma(p, r, splat(9.6184891e-3f));
  p = fma(p, r, splat(5.5503286e-2f));
  p = fma(p, r, splat(2.4022646e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.0f), _CMP_NLT_UQ);
  return (Vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  const Vf power = (Vf)((__builtin_convertvector(n, Vi) + 127) << 23);
  return given < splat(-126.0f) ? Vf{} : p * power; // a NaN goes on
#endif
}

// The weights' base: scores below it by infinity must not become NaN.
KVKEYE_INLINE Vf base_of(Vf top) {
  return top == -INFINITY ? Vf{} : top;
}

// State.

// Rows side by side, one per lane: scores relative to 2^max were summed to total.
struct Totals {
  Vf max, total;
};

// By how much the older and the newer outputs are scaled when a later split joins.
struct Joint {
  Vf keep, add;
};

// Adds the totals of a later split. Exact when one of the two is empty.
KVKEYE_INLINE Joint join(Totals& sum, const Totals& split) {
  const Vf top = sum.max > split.max ? sum.max : split.max;
  const auto empty = split.total == 0.0f; // nothing seen; a NaN goes on
  const Joint joint{empty ? splat(1.0f) : weight_of(sum.max - base_of(top)),
                    empty ? Vf{} : weight_of(split.max - base_of(top))};
  sum.total = fma(joint.add, split.total, joint.keep * sum.total);
  sum.max = empty ? sum.max : top;
  return joint;
}

// sum = keep sum + add split, over whole vectors.
KVKEYE_INLINE void scale_add(float* sum, const float* split, int64_t width, float keep, float add) {
  for (int64_t i = 0; i < width; i += kLanes)
    store(sum + i, fma(load(split + i), splat(add), load(sum + i) * keep));
}

KVKEYE_INLINE void clear(float* target, int64_t size, float value) {
  for (int64_t i = 0; i < size; ++i)
    target[i] = value;
}

// What a kernel asks for, for one KV head, is a Work:
//   int count                                       rows, each a (token, query head of the group)
//   const T* query(int r); int64_t seen(int r)      a row's query [dim], and how many positions it sees: the
//                                                   first ones
//   void locate(start, count, keys, values)         the rows [dim] at positions [start, start + count)
//   int locate_next(keys, values)                   those of the first tile that is read after this Work, if
//                                                   known; how many positions
//   void target(int r, T*& o, float*& lse)          where a row's result goes
//   void partial(int r, float*& o, float*& max, float*& total)    where its state after one split goes

// The tile at `start`, or behind `last` the first one of the next Work; how many positions.
template <class Work, class T>
KVKEYE_INLINE int locate_ahead(const Work& work, int64_t start, int64_t last, const T** keys,
                               const T** values) {
  const int columns = tile_columns(start, last);
  if (columns == 0)
    return work.locate_next(keys, values);
  work.locate(start, columns, keys, values);
  return columns;
}

template <class T>
KVKEYE_INLINE void finish_row(const float* out, int64_t dim, float max, float total, T* o, float* lse) {
  const float scale = total == 0.0f ? 0.0f : 1.0f / total;
  for_vectors(dim,
              [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(o + i, load(out + i, lanes) * scale, lanes); });
  *lse = total == 0.0f ? -INFINITY : max * kLn2 + logf(total);
}

template <class Work>
KVKEYE_INLINE void write_result(const Work& work, int r, const float* out, int64_t dim, float max,
                                float total) {
  typename Work::Type* o;
  float* lse;
  work.target(r, o, lse);
  finish_row(out, dim, max, total, o, lse);
}

template <class Work>
KVKEYE_INLINE void write_partial(const Work& work, int r, const float* out, int64_t dim, float max,
                                 float total) {
  float *o = nullptr, *partial_max = nullptr, *partial_total = nullptr;
  work.partial(r, o, partial_max, partial_total);
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(o + i, load(out + i, lanes), lanes); });
  *partial_max = max;
  *partial_total = total;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
