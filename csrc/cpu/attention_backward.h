// Gradients of attention over packed sequences: as in the forward pass the rows lie in the lanes.
//
// Softmax weights P and gradients of the scores S are computed again tile by tile; then
//   grad V [keys, dims] += P' dO      grad K [keys, dims] += S' Q      grad Q' [dims, rows] += K' S'
// so P and S are needed with rows as neighbours, and S with keys as neighbours too.
#pragma once

#include "attention_lanes.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kBlock = 2 * kGroup; // rows whose gradients of keys and values are summed in one go

// c[m, lanes] += sum_k a[m, k] b[k, lanes] for `rows` rows and `vectors` vectors of lanes.
template <class Product, int M, int N>
void add_strip(const float* a, int64_t a_row, const float* b, float* c, int64_t width, int64_t rows,
               int64_t depth) {
  int64_t i = 0;
  for (; i + M <= rows; i += M)
    lane_block<Product, M, N, Begin::add, Walk::rows>(a + i * a_row, a_row, b, width, c + i * width, width,
                                                      depth, nullptr);
  for (; i < rows; ++i)
    lane_block<Product, 1, N, Begin::add, Walk::rows>(a + i * a_row, a_row, b, width, c + i * width, width,
                                                      depth, nullptr);
}

template <class Product>
void add_product(const float* a, int64_t a_row, const float* b, float* c, int64_t width, int64_t rows,
                 int64_t depth) {
  constexpr int widest = kLanes == 16 ? 4 : 2;
  for (int64_t left = width / kLanes; left > 0;) {
    const int64_t n = kLanes == 16 && left == 5 ? 5 : left < widest ? left : widest;
    if constexpr (kLanes == 16) {
      if (n == 5)
        add_strip<Product, 4, 5>(a, a_row, b, c, width, rows, depth);
      else if (n == 4)
        add_strip<Product, 4, 4>(a, a_row, b, c, width, rows, depth);
      else if (n == 3)
        add_strip<Product, 8, 3>(a, a_row, b, c, width, rows, depth);
    }
    if (n == 2)
      add_strip<Product, kSteps, 2>(a, a_row, b, c, width, rows, depth);
    else if (n == 1)
      add_strip<Product, kSteps, 1>(a, a_row, b, c, width, rows, depth);
    left -= n;
    b += n * kLanes;
    c += n * kLanes;
  }
}

// One sequence and one KV head. A row is (token, query head of the group); rows fill up blocks of kBlock, and
// those behind the last one weigh nothing.
template <class T, class Product> struct Sequence {
  static constexpr int kPer = Product::per_word;
  const VarlenAttentionBackwardParams<T>& p;
  int64_t first, length, kv_head, group, dim, width, words, key_width, rows, blocks;
  float *q, *grad_o;            // [groups of kGroup, words, kGroup]
  float *q_rows, *grad_o_rows;  // [rows / kPer, width]: kPer neighbouring rows in a word
  float* grad_q;                // [groups of kGroup, width, kGroup]
  float *lse, *delta;           // [rows]; delta = grad_o . o - grad_lse
  float *scores, *grads;        // [kTile, kGroup]
  float *weights, *score_grads; // [kTile, kBlock / kPer]: of a block, kPer neighbouring rows in a word
  float *keys, *values;         // [kTile, key_width]
  float* key_pairs;             // [kTile / kPer, width]: kPer neighbouring keys in a word
  float *grad_k, *grad_v;       // [kTile, width]
  float* result;                // [kLanes, width]

  Sequence(const VarlenAttentionBackwardParams<T>& params, int64_t item)
      : p(params), first(p.cu_seqlens[item % p.num_sequences]),
        length(p.cu_seqlens[item % p.num_sequences + 1] - first), kv_head(item / p.num_sequences),
        group(p.num_q_heads / p.num_kv_heads), dim(p.head_dim), width(padded_dim(dim)),
        words(words_of<Product>(dim)), key_width(round_up(words)), rows(length * group),
        blocks((rows + kBlock - 1) / kBlock) {
    Arena arena(p.scratch);
    const int64_t all = blocks * kBlock;
    q = arena.take(all * words);
    grad_o = arena.take(all * words);
    q_rows = arena.take(all / kPer * width);
    grad_o_rows = arena.take(all / kPer * width);
    grad_q = arena.take(all * width);
    lse = arena.take(all);
    delta = arena.take(all);
    scores = arena.take(kTile * kGroup);
    grads = arena.take(kTile * kGroup);
    weights = arena.take(kTile * kBlock / kPer);
    score_grads = arena.take(kTile * kBlock / kPer);
    keys = arena.take(kTile * key_width);
    values = arena.take(kTile * key_width);
    key_pairs = arena.take(kTile / kPer * width);
    grad_k = arena.take(kTile * width);
    grad_v = arena.take(kTile * width);
    result = arena.take(kLanes * width);
  }

  int64_t token(int64_t row) const { return first + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  int64_t dense(int64_t row) const { return (token(row) * p.num_q_heads + head(row)) * dim; }
  const T* query(int64_t row) const {
    return p.q + token(row) * p.q_strides.token + head(row) * p.q_strides.head;
  }
  const T* key(int64_t at) const {
    return p.k + (first + at) * p.k_strides.token + kv_head * p.k_strides.head;
  }
  const T* value(int64_t at) const {
    return p.v + (first + at) * p.v_strides.token + kv_head * p.v_strides.head;
  }

  // Rows [row, row + kLanes), word by word, into lanes.
  template <class Load> void load_lanes(int64_t row, float* target, const Load& row_words) {
    for (int64_t w = 0; w < words; w += kLanes) {
      Vf block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = row + i < rows ? row_words(row + i, w) : Vf{};
      transpose(block);
      for (int i = 0; i < kLanes && w + i < words; ++i)
        store(target + (row / kGroup * words + w + i) * kGroup + row % kGroup, block[i]);
    }
  }

  void load_rows_of_block(int64_t row) {
    const int count = rows - row < kTile ? (int)(rows - row) : kTile;
    const T *queries[kTile], *upstream[kTile];
    for (int i = 0; i < count; ++i) {
      queries[i] = query(row + i);
      upstream[i] = p.grad_o + dense(row + i);
    }
    Product::load_values(queries, count, dim, q_rows + row / kPer * width);
    Product::load_values(upstream, count, dim, grad_o_rows + row / kPer * width);
  }

  void load_queries() {
    const int64_t all = blocks * kBlock;
    clear(grad_q, all * width, 0.0f);
    clear(q_rows, all / kPer * width, 0.0f);
    clear(grad_o_rows, all / kPer * width, 0.0f);
    clear(delta, all, 0.0f);
    clear(lse, all, INFINITY);
    for (int64_t row = 0; row < all; row += kLanes) {
      load_lanes(row, q,
                 [&](int64_t r, int64_t w) KVKEYE_LAMBDA { return Product::load_words(query(r), w, dim); });
      load_lanes(row, grad_o, [&](int64_t r, int64_t w) KVKEYE_LAMBDA {
        return Product::load_words(p.grad_o + dense(r), w, dim);
      });
    }
    for (int64_t row = 0; row < rows; row += kTile)
      load_rows_of_block(row);
    for (int64_t row = 0; row < rows; ++row) {
      Vf product{};
      for_vectors(dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
        product = fma(load(p.grad_o + dense(row) + i, lanes), load(p.o + dense(row) + i, lanes), product);
      });
      const int64_t index = token(row) * p.num_q_heads + head(row);
      lse[row] = p.lse[index];
      delta[row] = sum(product) - p.grad_lse[index];
    }
  }

  void load_keys(int64_t start, int columns) {
    const T *key_rows[kTile] = {}, *value_rows[kTile] = {};
    for (int j = 0; j < columns; ++j) {
      key_rows[j] = key(start + j);
      value_rows[j] = value(start + j);
    }
    load_tile<Product>(key_rows, columns, dim, keys, key_width);
    load_tile<Product>(value_rows, columns, dim, values, key_width);
    Product::load_values(key_rows, columns, dim, key_pairs);
    clear(grad_k, kTile * width, 0.0f);
    clear(grad_v, kTile * width, 0.0f);
  }

  // Weights of one vector of rows and their scores' gradients, which replace the scores and the weights'
  // gradients.
  KVKEYE_APART void differentiate(int64_t row, int columns) {
    float *score = scores + row % kGroup, *grad = grads + row % kGroup;
    const Vf scale = splat(p.softmax_scale), base = load(lse + row), shift = load(delta + row);
    for (int j = 0; j < columns; ++j, score += kGroup, grad += kGroup) {
      const Vf weight = weight_of(fma(load(score), scale, -base) * kLog2E);
      store(score, weight);
      store(grad, weight * (load(grad) - shift));
    }
  }

  // Where a causal row does not see a key, both are zero.
  KVKEYE_APART void hide_unseen(int64_t row, int64_t start, int columns) {
    int32_t last[kLanes];
    for (int i = 0; i < kLanes; ++i)
      last[i] = (int32_t)((row + i) / group - start);
    Vi bound;
    std::memcpy(&bound, last, sizeof bound);
    for (int j = 0; j < columns; ++j) {
      float *score = scores + j * kGroup + row % kGroup, *grad = grads + j * kGroup + row % kGroup;
      const auto seen = bound >= j;
      store(score, seen ? load(score) : Vf{});
      store(grad, seen ? load(grad) : Vf{});
    }
  }

  // A group of kGroup rows: weights and gradients of its scores, and the gradient of its queries.
  void attend_group(int64_t row, int64_t start, int columns) {
    const int64_t at = row / kGroup;
    Ahead<T> none{nullptr, 0, 0, dim};
    lane_product<Product, kGroupVectors, Begin::zero, Walk::rows>(
        keys, key_width, q + at * words * kGroup, kGroup, scores, columns, words, nullptr, none);
    lane_product<Product, kGroupVectors, Begin::zero, Walk::rows>(
        values, key_width, grad_o + at * words * kGroup, kGroup, grads, columns, words, nullptr, none);
    for (int n = 0; n < kGroup; n += kLanes) {
      differentiate(row + n, columns);
      if (p.causal && start + columns > row / group)
        hide_unseen(row + n, start, columns);
    }
    if (columns % kPer != 0)
      clear(grads + columns * kGroup, kGroup, 0.0f);
    Product::template gather_rows<kGroupVectors>(scores, kGroup, columns, weights + row % kBlock / kPer,
                                                 kBlock / kPer);
    Product::template gather_rows<kGroupVectors>(grads, kGroup, columns, score_grads + row % kBlock / kPer,
                                                 kBlock / kPer);
    for (int j = 0; j < columns; j += 2)
      for (int n = 0; n < kGroup; n += kLanes) {
        float* grad = grads + j * kGroup + n;
        Product::store_weights(grad, kGroup, load(grad), load(grad + kGroup));
      }
    lane_product<Product, kGroupVectors, Begin::add, Walk::columns>(
        key_pairs, width, grads, kPer * kGroup, grad_q + at * width * kGroup, dim, words_of<Product>(columns),
        nullptr, none);
  }

  void attend_tile(int64_t start, int columns) {
    for (int64_t row = p.causal ? start * group / kBlock * kBlock : 0; row < rows; row += kBlock) {
      attend_group(row, start, columns);
      attend_group(row + kGroup, start, columns);
      add_product<Product>(weights, kBlock / kPer, grad_o_rows + row / kPer * width, grad_v, width, columns,
                           kBlock / kPer);
      add_product<Product>(score_grads, kBlock / kPer, q_rows + row / kPer * width, grad_k, width, columns,
                           kBlock / kPer);
    }
  }

  KVKEYE_INLINE void store_scaled(const float* source, float scale, int64_t size, T* target) {
    for_vectors(size, [&](int64_t i, int lanes)
                          KVKEYE_LAMBDA { store(target + i, load(source + i, lanes) * scale, lanes); });
  }

  void store_keys(int64_t start, int columns) {
    for (int j = 0; j < columns; ++j) {
      const int64_t place = ((first + start + j) * p.num_kv_heads + kv_head) * dim;
      store_scaled(grad_k + j * width, p.softmax_scale, dim, p.grad_k + place);
      store_scaled(grad_v + j * width, 1.0f, dim, p.grad_v + place);
    }
  }

  void store_queries() {
    for (int64_t row = 0; row < rows; row += kLanes) {
      const float* from = grad_q + row / kGroup * width * kGroup + row % kGroup;
      for (int64_t d = 0; d < width; d += kLanes) {
        Vf block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = load(from + (d + i) * kGroup);
        transpose(block);
        for (int i = 0; i < kLanes; ++i)
          store(result + i * width + d, block[i]);
      }
      for (int i = 0; i < kLanes && row + i < rows; ++i)
        store_scaled(result + i * width, p.softmax_scale, dim, p.grad_q + dense(row + i));
    }
  }

  void run() {
    load_queries();
    for (int64_t start = 0; start < length; start += kTile) {
      const int columns = tile_columns(start, length);
      load_keys(start, columns);
      attend_tile(start, columns);
      store_keys(start, columns);
    }
    store_queries();
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
