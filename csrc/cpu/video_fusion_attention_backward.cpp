// tile_attention, backward. With s the scaled scores of a row and a part b, M the least denominator of the
// tiles that hold both, and g = grad_o . v: alpha = sum W exp(M - L), beta = sum (W delta - grad_lse) exp(M -
// L) over those tiles, P = exp(s - M); then grad_v = P alpha grad_o and the gradient of s is P (alpha g -
// beta).
#include "video_fusion_attention.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

template <class T> struct Backward {
  const TileAttentionBackwardParams<T>& p;
  const TileAttentionParams<T>& f;
  int64_t sequence, width;         // batch times heads; dim in whole vectors of 16
  float *grad_k, *grad_v;          // [tokens, width]
  float *q, *grad_o, *grad_q;      // [rows, width]
  float *base, *alpha, *beta;      // [parts, rows]
  float *weights, *grads;          // [2, kBackwardRows, kTile]: P, gradients of the scores
  float *keys, *keys_t, *values_t; // [kTile, width], transposed: [dim, kTile]
  float* rest;                     // of the scratch memory

  Backward(const TileAttentionBackwardParams<T>& params, int64_t item)
      : p(params), f(params.forward), sequence(item), width(padded_dim(f.dim)) {
    const TileGeometry& t = f.tiling;
    Arena arena(f.scratch);
    grad_k = arena.take(t.tokens * width);
    grad_v = arena.take(t.tokens * width);
    q = arena.take(t.most_rows * width);
    grad_o = arena.take(t.most_rows * width);
    grad_q = arena.take(t.most_rows * width);
    base = arena.take(t.most_parts * t.most_rows);
    alpha = arena.take(t.most_parts * t.most_rows);
    beta = arena.take(t.most_parts * t.most_rows);
    weights = arena.take(2 * kBackwardRows * kTile);
    grads = arena.take(2 * kBackwardRows * kTile);
    keys = arena.take(kTile * width);
    keys_t = arena.take(width * kTile);
    values_t = arena.take(width * kTile);
    rest = arena.next;
    clear(grad_k, t.tokens * width, 0.0f);
    clear(grad_v, t.tokens * width, 0.0f);
    for (int64_t i = 0; i < t.tiles * t.length; ++i)
      p.grad_weights[item * t.tiles * t.length + i] = 0.0;
  }
};

template <class T>
KVKEYE_INLINE void load_padded(const T* source, int64_t dim, int64_t width, float* target) {
  clear(target + dim, width - dim, 0.0f);
  for_vectors(dim,
              [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes), lanes); });
}

// Queries and upstream gradients of the block in fp32.
template <class T> void load_block(Backward<T>& s, const PartResults<T>& results) {
  for (int64_t row = 0; row < results.rows; ++row) {
    load_padded(results.at(s.f.q, s.f.q_strides, results.block.begin + row), s.f.dim, s.width,
                s.q + row * s.width);
    load_padded(s.p.grad_o + results.dense(row), s.f.dim, s.width, s.grad_o + row * s.width);
  }
  clear(s.grad_q, results.rows * s.width, 0.0f);
}

// grad_o . (the part's sums) of one row.
template <class T>
float slope(const Backward<T>& s, const PartResults<T>& results, int64_t part, int64_t row) {
  const float* o = results.o + (part * results.rows + row) * results.width;
  return sum_vectors(s.f.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    return load(s.grad_o + row * s.width + i, lanes) * load(o + i, lanes);
  });
}

// base, alpha and beta of one row, and what it adds to grad_weights.
template <class T>
void weigh_row(Backward<T>& s, const PartResults<T>& results, int64_t row, float* slopes,
               Denominator* joint) {
  const TileBlock& block = results.block;
  const TileGeometry& t = s.f.tiling;
  const float* grad_lse = s.p.grad_lse + s.sequence * s.f.lse_size;
  for (int64_t member = 0; member < block.num_members; ++member)
    joint[member] = results.join(row, member);
  for (int64_t part = 0; part < block.num_parts; ++part) {
    const int64_t at = part * results.rows + row;
    slopes[part] = slope(s, results, part, row);
    s.base[at] = INFINITY;
    s.alpha[at] = s.beta[at] = 0.0f;
    for (int64_t member = 0; member < block.num_members; ++member)
      if (results.joins(part, member))
        s.base[at] = fminf(s.base[at], joint[member].log2());
  }
  for (int64_t member = 0; member < block.num_members; ++member) {
    const TilePlace place = place_of(t, block.begin + row, block.members[member]);
    const float weight = weight_of(t, place);
    float delta = 0.0f; // grad_o . o of the tile
    for (int64_t part = 0; part < block.num_parts; ++part)
      if (results.joins(part, member))
        delta += results.share(part, row, joint[member]) * slopes[part];
    if (place.weight >= 0)
      s.p.grad_weights[s.sequence * t.tiles * t.length + place.weight] += delta;
    for (int64_t part = 0; part < block.num_parts; ++part)
      if (results.joins(part, member)) {
        const int64_t at = part * results.rows + row;
        const float scale = exp2f(s.base[at] - joint[member].top) / joint[member].total;
        s.alpha[at] += weight * scale;
        s.beta[at] += (weight * delta - grad_lse[place.lse]) * scale;
      }
  }
}

template <class T> void load_keys(Backward<T>& s, const PartResults<T>& results, int64_t first, int columns) {
  const T *key_rows[kTile], *value_rows[kTile];
  for (int j = 0; j < columns; ++j) {
    key_rows[j] = results.at(s.f.k, s.f.k_strides, first + j);
    value_rows[j] = results.at(s.f.v, s.f.v_strides, first + j);
    load_padded(key_rows[j], s.f.dim, s.width, s.keys + j * s.width);
  }
  load_transposed(key_rows, columns, s.f.dim, s.keys_t);
  load_transposed(value_rows, columns, s.f.dim, s.values_t);
}

// c = a b as two halves of the depth side by side: chains of half the length lose half as much.
void multiply_halves(const float* a, int64_t a_row, const float* b, float* c, int64_t rows, int64_t depth,
                     int64_t columns) {
  const int64_t half = depth / 2;
  multiply<false>({a, a_row, 1}, b, kTile, c, kTile, rows, half, columns);
  multiply<false>({a + half, a_row, 1}, b + half * kTile, kTile, c + kBackwardRows * kTile, kTile, rows,
                  depth - half, columns);
}

KVKEYE_INLINE Vf sum_halves(const float* c) {
  return load(c) + load(c + kBackwardRows * kTile);
}

// Rows [row, row + rows) of the block against `columns` loaded keys of a part.
template <class T>
void differentiate_rows(Backward<T>& s, const PartResults<T>& results, int64_t part, int64_t row, int rows,
                        int64_t first, int columns) {
  const float *q = s.q + row * s.width, *grad_o = s.grad_o + row * s.width;
  const int64_t padded = round_up(columns);
  const Vf unit = splat(s.f.softmax_scale * kLog2E);
  multiply_halves(q, s.width, s.keys_t, s.weights, rows, s.f.dim, padded);
  multiply_halves(grad_o, s.width, s.values_t, s.grads, rows, s.f.dim, padded);
  for (int r = 0; r < rows; ++r) {
    const int64_t at = part * results.rows + row + r;
    const Vf base = splat(s.base[at]), alpha = splat(s.alpha[at]), beta = splat(s.beta[at]);
    float *weights = s.weights + r * kTile, *grads = s.grads + r * kTile;
    for (int i = 0; i < columns; i += kLanes) { // columns behind the last are not multiplied below
      const Vf weight = weight_of(fma(sum_halves(weights + i), unit, -base));
      store(weights + i, weight * alpha);
      store(grads + i, weight * (sum_halves(grads + i) * alpha - beta) * s.f.softmax_scale);
    }
  }
  multiply<true>({s.weights, 1, kTile}, grad_o, s.width, s.grad_v + first * s.width, s.width, columns, rows,
                 s.width);
  multiply<true>({s.grads, 1, kTile}, q, s.width, s.grad_k + first * s.width, s.width, columns, rows,
                 s.width);
  multiply<true>({s.grads, kTile, 1}, s.keys, s.width, s.grad_q + row * s.width, s.width, rows, columns,
                 s.width);
}

template <class T> KVKEYE_INLINE void store_row(const float* source, int64_t dim, T* target) {
  for_vectors(dim,
              [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes), lanes); });
}

template <class T> void differentiate_block(Backward<T>& s, const TileBlock& block) {
  Arena arena(s.rest);
  const PartResults<T> results(s.f, block, s.sequence, arena);
  float* slopes = arena.take(block.num_parts);
  auto* joint = (Denominator*)arena.take(2 * block.num_members);
  results.attend(arena.next, true);
  load_block(s, results);
  for (int64_t row = 0; row < results.rows; ++row)
    weigh_row(s, results, row, slopes, joint);
  for (int64_t part = 0; part < block.num_parts; ++part)
    for (int64_t first = block.parts[part].begin; first < block.parts[part].end; first += kTile) {
      const int64_t left = block.parts[part].end - first;
      const int columns = left < kTile ? (int)left : kTile;
      load_keys(s, results, first, columns);
      for (int64_t row = 0; row < results.rows; row += kBackwardRows) {
        const int64_t rows = results.rows - row < kBackwardRows ? results.rows - row : kBackwardRows;
        differentiate_rows(s, results, part, row, (int)rows, first, columns);
      }
    }
  for (int64_t row = 0; row < results.rows; ++row)
    store_row(s.grad_q + row * s.width, s.f.dim, s.p.grad_q + results.dense(row));
}

} // namespace

template <class T>
void tile_attention_backward(const TileAttentionBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    Backward<T> state(p, item);
    const TileGeometry& t = p.forward.tiling;
    for (int64_t block = 0; block < t.num_blocks; ++block)
      differentiate_block(state, t.blocks[block]);
    for (int64_t token = 0; token < t.tokens; ++token) {
      const int64_t heads = p.forward.heads;
      const int64_t place = ((item / heads * t.tokens + token) * heads + item % heads) * p.forward.dim;
      store_row(state.grad_k + token * state.width, p.forward.dim, p.grad_k + place);
      store_row(state.grad_v + token * state.width, p.forward.dim, p.grad_v + place);
    }
  }
}

KVKEYE_INSTANTIATE(tile_attention_backward, TileAttentionBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
