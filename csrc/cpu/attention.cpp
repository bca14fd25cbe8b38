// Attention over packed sequences, forward and backward.
#include "attention_tile.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// One sequence and one KV head of the backward pass. A row is (token, query head of the group).
template <class T> struct Sequence {
  const VarlenAttentionBackwardParams<T>& p;
  int64_t first, length, kv_head, group, width;
  float *q, *grad_o, *grad_q; // [length * group, width]
  float *lse, *delta;         // [length * group]; delta = grad_o . o - grad_lse
  float *weights, *grads;     // [kBackwardRows, kTile]: softmax weights, gradients of the scaled scores
  float *keys, *keys_t, *values_t, *grad_k, *grad_v; // [kTile, width], transposed: [dim, kTile]

  Sequence(const VarlenAttentionBackwardParams<T>& params, int64_t item)
      : p(params), first(p.cu_seqlens[item % p.num_sequences]),
        length(p.cu_seqlens[item % p.num_sequences + 1] - first), kv_head(item / p.num_sequences),
        group(p.num_q_heads / p.num_kv_heads), width(round_up(p.head_dim)) {
    Arena arena(p.scratch);
    const int64_t rows = length * group;
    q = arena.take(rows * width);
    grad_o = arena.take(rows * width);
    grad_q = arena.take(rows * width);
    lse = arena.take(rows);
    delta = arena.take(rows);
    weights = arena.take(kBackwardRows * kTile);
    grads = arena.take(kBackwardRows * kTile);
    keys = arena.take(kTile * width);
    keys_t = arena.take(p.head_dim * kTile);
    values_t = arena.take(p.head_dim * kTile);
    grad_k = arena.take(kTile * width);
    grad_v = arena.take(kTile * width);
  }

  int64_t token(int64_t row) const { return first + row / group; }
  int64_t head(int64_t row) const { return kv_head * group + row % group; }
  int64_t dense(int64_t row) const { return (token(row) * p.num_q_heads + head(row)) * p.head_dim; }
};

template <class T> void load_queries(Sequence<T>& s) {
  const auto& p = s.p;
  for (int64_t r = 0; r < s.length * s.group; ++r) {
    load_row(p.q + s.token(r) * p.q_strides.token + s.head(r) * p.q_strides.head, p.head_dim,
             s.q + r * s.width);
    load_row(p.grad_o + s.dense(r), p.head_dim, s.grad_o + r * s.width);
    Vf product{};
    for_vectors(p.head_dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      product = fma(load(p.grad_o + s.dense(r) + i, lanes), load(p.o + s.dense(r) + i, lanes), product);
    });
    const int64_t index = s.token(r) * p.num_q_heads + s.head(r);
    s.lse[r] = p.lse[index];
    s.delta[r] = sum(product) - p.grad_lse[index];
  }
  clear(s.grad_q, s.length * s.group * s.width, 0.0f);
}

template <class T> void load_tile(Sequence<T>& s, int64_t start, int columns) {
  const auto& p = s.p;
  const T *keys[kTile], *values[kTile];
  for (int j = 0; j < columns; ++j) {
    keys[j] = p.k + (s.first + start + j) * p.k_strides.token + s.kv_head * p.k_strides.head;
    values[j] = p.v + (s.first + start + j) * p.v_strides.token + s.kv_head * p.v_strides.head;
  }
  load_rows(keys, columns, p.head_dim, s.keys);
  load_transposed(keys, columns, p.head_dim, s.keys_t);
  load_transposed(values, columns, p.head_dim, s.values_t);
  clear(s.grad_k, kTile * s.width, 0.0f);
  clear(s.grad_v, kTile * s.width, 0.0f);
}

// Scores become softmax weights, gradients of the weights become gradients of the scores.
template <class T>
KVKEYE_INLINE void differentiate_row(Sequence<T>& s, int64_t row, int r, int64_t start, int columns) {
  const View view{s.p.causal ? row / s.group + 1 : s.length, 0};
  const uint64_t seen = visible(view, start) & (columns == 64 ? ~(uint64_t)0 : ((uint64_t)1 << columns) - 1);
  float *weights = s.weights + r * kTile, *grads = s.grads + r * kTile;
  for (int i = 0; i < columns; i += kLanes) {
    const Vf score = (load(weights + i) * s.p.softmax_scale - s.lse[row]) * kLog2E;
    const Vf weight = weight_of(hide(score, seen, i, -INFINITY));
    store(weights + i, weight);
    store(grads + i, hide(weight * (load(grads + i) - s.delta[row]) * s.p.softmax_scale, seen, i, 0.0f));
  }
}

// Rows [row, row + rows) against the loaded tile.
template <class T>
void differentiate_block(Sequence<T>& s, int64_t row, int rows, int64_t start, int columns) {
  const float *q = s.q + row * s.width, *grad_o = s.grad_o + row * s.width;
  const int64_t dim = s.p.head_dim, padded = round_up(columns);
  multiply<false>({q, s.width, 1}, s.keys_t, kTile, s.weights, kTile, rows, dim, padded);
  multiply<false>({grad_o, s.width, 1}, s.values_t, kTile, s.grads, kTile, rows, dim, padded);
  for (int r = 0; r < rows; ++r)
    differentiate_row(s, row + r, r, start, columns);
  multiply<true>({s.weights, 1, kTile}, grad_o, s.width, s.grad_v, s.width, columns, rows, s.width);
  multiply<true>({s.grads, 1, kTile}, q, s.width, s.grad_k, s.width, columns, rows, s.width);
  multiply<true>({s.grads, kTile, 1}, s.keys, s.width, s.grad_q + row * s.width, s.width, rows, columns,
                 s.width);
}

template <class T> KVKEYE_INLINE void store_row(const float* source, int64_t dim, T* target) {
  for_vectors(dim,
              [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(target + i, load(source + i, lanes), lanes); });
}

template <class T> void differentiate(Sequence<T>& s) {
  const auto& p = s.p;
  const int64_t rows = s.length * s.group;
  load_queries(s);
  for (int64_t start = 0; start < s.length; start += kTile) {
    const int columns = s.length - start < kTile ? (int)(s.length - start) : kTile;
    load_tile(s, start, columns);
    for (int64_t row = p.causal ? start * s.group : 0; row < rows; row += kBackwardRows)
      differentiate_block(s, row, (int)(rows - row < kBackwardRows ? rows - row : kBackwardRows), start,
                          columns);
    for (int j = 0; j < columns; ++j) {
      const int64_t place = ((s.first + start + j) * p.num_kv_heads + s.kv_head) * p.head_dim;
      store_row(s.grad_k + j * s.width, p.head_dim, p.grad_k + place);
      store_row(s.grad_v + j * s.width, p.head_dim, p.grad_v + place);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    store_row(s.grad_q + r * s.width, p.head_dim, p.grad_q + s.dense(r));
}

// The Work of one span and KV head. Rows: (token, query head of the group).
template <class T> struct PackedRows {
  using Type = T;
  const VarlenAttentionParams<T>& p;
  const QuerySpan& span;
  int64_t kv_head, group;
  int count;

  PackedRows(const VarlenAttentionParams<T>& params, const QuerySpan& of, int64_t head)
      : p(params), span(of), kv_head(head), group(p.num_q_heads / p.num_kv_heads),
        count((int)((span.end - span.begin) * group)) {}

  // One past the last position that any row sees.
  int64_t end() const { return (p.causal ? span.end : span.sequence_end) - span.sequence_begin; }
  int64_t token(int r) const { return span.begin + r / group; }
  int64_t head(int r) const { return kv_head * group + r % group; }
  const T* query(int r) const { return p.q + token(r) * p.q_strides.token + head(r) * p.q_strides.head; }
  View view(int r) const { return {(p.causal ? token(r) + 1 : span.sequence_end) - span.sequence_begin, 0}; }

  void locate(int64_t start, int columns, const T** keys, const T** values) const {
    for (int j = 0; j < columns; ++j) {
      const int64_t position = span.sequence_begin + start + j;
      keys[j] = p.k + position * p.k_strides.token + kv_head * p.k_strides.head;
      values[j] = p.v + position * p.v_strides.token + kv_head * p.v_strides.head;
    }
  }

  void target(int r, T*& o, float*& lse) const {
    const int64_t row = token(r) * p.num_q_heads + head(r);
    o = p.o + row * p.head_dim;
    lse = p.lse + row;
  }

  void partial(int, float*&, float*&, float*&) const {} // never by split
};

} // namespace

template <class T> void varlen_attention(const VarlenAttentionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const PackedRows<T> rows(p, p.spans[item % p.num_spans], item / p.num_spans);
    attend<T>(rows, p.head_dim, p.softmax_scale, rows.end(), -1, p.scratch);
  }
}

template <class T>
void varlen_attention_backward(const VarlenAttentionBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    Sequence<T> sequence(p, item);
    differentiate(sequence);
  }
}

KVKEYE_INSTANTIATE(varlen_attention, VarlenAttentionParams)
KVKEYE_INSTANTIATE(varlen_attention_backward, VarlenAttentionBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
