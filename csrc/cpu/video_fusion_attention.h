// One block of queries against its parts of keys: each part's softmax on its own, and how parts make tiles.
#pragma once

#include "attention_tile.h"
#include "kvkeye/video_fusion_attention.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Where a token stands in a tile.
struct TilePlace {
  int64_t lse;    // in [tiles, length, tokens per frame], then text
  int64_t weight; // in [tiles, length], or -1 for text, whose weight is one
};

KVKEYE_INLINE TilePlace place_of(const TileGeometry& t, int64_t token, int32_t tile) {
  if (tile < 0)
    return {(t.tiles * t.length - t.frames) * t.per_frame + token, -1};
  const int64_t shifted = (token / t.per_frame - t.starts[tile]) % t.frames;
  const int64_t at = tile * t.length + (shifted < 0 ? shifted + t.frames : shifted);
  return {at * t.per_frame + token % t.per_frame, at};
}

KVKEYE_INLINE float weight_of(const TileGeometry& t, const TilePlace& place) {
  return place.weight < 0 ? 1.0f : t.weights[place.weight];
}

// The Work of a block and one part of its keys. A row's result is its state, not its quotient: rounded to a
// logarithm, denominators would lose the digits that their ratios need.
template <class T> struct PartRows {
  using Type = float;
  const TileAttentionParams<T>& p;
  const T *q, *k, *v;     // of the batch and head, at the block's and the part's first token
  float *o, *max, *total; // [count, padded_dim], [count]: sums relative to 2^max
  int64_t length;
  int count;

  const T* query(int r) const { return q + r * p.q_strides.token; }
  int64_t seen(int) const { return length; }
  void locate(int64_t start, int columns, const T** keys, const T** values) const {
    for (int j = 0; j < columns; ++j) {
      keys[j] = k + (start + j) * p.k_strides.token;
      values[j] = v + (start + j) * p.v_strides.token;
    }
  }
  int locate_next(const T**, const T**) const { return 0; }
  void partial(int, float*&, float*&, float*&) const {} // never by split
};

template <class T>
KVKEYE_INLINE void write_result(const PartRows<T>& work, int r, const float* out, int64_t dim, float max,
                                float total) {
  float* row = work.o + r * padded_dim(dim);
  for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(row + i, load(out + i, lanes), lanes); });
  work.max[r] = max;
  work.total[r] = total;
}

// The softmax denominator of a row in a tile is total 2^top.
struct Denominator {
  float top, total;
  float log2() const { return top + log2f(total); }
};

// A block with the results of its parts.
template <class T> struct PartResults {
  const TileAttentionParams<T>& p;
  const TileBlock& block;
  int64_t batch, head, rows, width;
  float *o, *max, *total; // [parts, rows, width], [parts, rows]

  PartResults(const TileAttentionParams<T>& params, const TileBlock& of, int64_t sequence, Arena& arena)
      : p(params), block(of), batch(sequence / p.heads), head(sequence % p.heads), rows(of.end - of.begin),
        width(padded_dim(p.dim)) {
    o = arena.take(of.num_parts * rows * width);
    max = arena.take(of.num_parts * rows);
    total = arena.take(of.num_parts * rows);
  }

  const T* at(const T* data, const TokenStrides& strides, int64_t token) const {
    return data + batch * strides.batch + token * strides.token + head * strides.head;
  }
  int64_t dense(int64_t row) const {
    return ((batch * p.tiling.tokens + block.begin + row) * p.heads + head) * p.dim;
  }

  // Gradients of weights are fp32: for them softmax weights are not rounded to bf16 (`exact`).
  void attend(float* scratch, bool exact) const {
    for (int64_t part = 0; part < block.num_parts; ++part) {
      const TilePart& keys = block.parts[part];
      const PartRows<T> work{p,
                             at(p.q, p.q_strides, block.begin),
                             at(p.k, p.k_strides, keys.begin),
                             at(p.v, p.v_strides, keys.begin),
                             o + part * rows * width,
                             max + part * rows,
                             total + part * rows,
                             keys.end - keys.begin,
                             (int)rows};
      if (exact)
        attend_by<T, Single>(work, p.dim, p.softmax_scale, work.length, -1, scratch);
      else
        KVKEYE_ISA::attend<T>(work, p.dim, p.softmax_scale, work.length, -1, scratch);
    }
  }

  bool joins(int64_t part, int64_t member) const {
    return block.joined[part * block.num_members + member] != 0;
  }

  Denominator join(int64_t row, int64_t member) const {
    Denominator joint{-INFINITY, 0.0f};
    for (int64_t part = 0; part < block.num_parts; ++part)
      if (joins(part, member))
        joint.top = fmaxf(joint.top, max[part * rows + row]);
    for (int64_t part = 0; part < block.num_parts; ++part)
      if (joins(part, member))
        joint.total += total[part * rows + row] * exp2f(max[part * rows + row] - joint.top);
    return joint;
  }

  // What one unit of the part's sums is of the tile's softmax.
  float share(int64_t part, int64_t row, const Denominator& of) const {
    return exp2f(max[part * rows + row] - of.top) / of.total;
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
