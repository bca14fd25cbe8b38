// What attention over packed sequences reads and writes.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

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
  int64_t seen(int r) const { return (p.causal ? token(r) + 1 : span.sequence_end) - span.sequence_begin; }

  void locate(int64_t start, int columns, const T** keys, const T** values) const {
    for (int j = 0; j < columns; ++j) {
      const int64_t position = span.sequence_begin + start + j;
      keys[j] = p.k + position * p.k_strides.token + kv_head * p.k_strides.head;
      values[j] = p.v + position * p.v_strides.token + kv_head * p.v_strides.head;
    }
  }

  int locate_next(const T**, const T**) const { return 0; } // threads take turns

  void target(int r, T*& o, float*& lse) const {
    const int64_t row = token(r) * p.num_q_heads + head(r);
    o = p.o + row * p.head_dim;
    lse = p.lse + row;
  }

  void partial(int, float*&, float*&, float*&) const {} // never by split
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
