// What attention over a paged cache reads and writes.
#pragma once

#include "attention_softmax.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// The Work of one span and KV head. Rows: (token, query head of the group).
template <class T> struct PagedRows {
  using Type = T;
  const PagedAttentionParams<T>& p;
  const PagedSpan& span;
  int64_t kv_head, group, first, fresh, context; // of the span's sequence: first new token, new tokens, all
  const int32_t* blocks;
  int count;
  bool tree;
  int64_t item, last; // this one, and the last one of those in hand
  uint8_t branch[64]; // the new tokens that the span's last one sees, in order

  PagedRows(const PagedAttentionParams<T>& params, int64_t of, int64_t last_item)
      : p(params), span(p.spans[of / p.num_kv_heads]), kv_head(of % p.num_kv_heads),
        group(p.num_q_heads / p.num_kv_heads), first(p.cu_seqlens_q[span.sequence]),
        fresh(p.cu_seqlens_q[span.sequence + 1] - first), context(p.context_lens[span.sequence]),
        blocks(p.block_table + span.sequence * p.max_blocks), count((int)((span.end - span.begin) * group)),
        tree(params.tree_mask != nullptr), item(of), last(last_item) {
    int size = 0;
    for (uint64_t left = tree ? bits(span.end - 1) : 0; left != 0; left &= left - 1)
      branch[size++] = (uint8_t)__builtin_ctzll(left);
  }

  uint64_t bits(int64_t token) const {
    return (uint64_t)p.tree_mask[token] & (fresh < 64 ? ((uint64_t)1 << fresh) - 1 : ~(uint64_t)0);
  }
  // How many positions a token sees. In a tree these are numbered along its branch, as they would be
  // if it had been decoded alone, wherever its ancestors lie in the cache.
  int64_t seen_by(int64_t token) const {
    return context - fresh + (tree ? __builtin_popcountll(bits(token)) : token - first + 1);
  }
  // One past the last position that any row sees: the last row sees the most.
  int64_t end() const { return seen_by(span.end - 1); }
  int64_t token(int r) const { return span.begin + r / group; }
  int64_t head(int r) const { return kv_head * group + r % group; }
  int64_t row(int r) const { return token(r) * p.num_q_heads + head(r); }
  const T* query(int r) const { return p.q + token(r) * p.q_strides.token + head(r) * p.q_strides.head; }

  int64_t seen(int r) const { return seen_by(token(r)); }

  // Neighbours of a block at once; along a branch each by itself.
  void locate(int64_t start, int columns, const T** keys, const T** values) const {
    const int64_t old = context - fresh;
    for (int j = 0; j < columns;) {
      const int64_t along = start + j - old;
      const bool branched = tree && along >= 0;
      const int64_t position = branched ? old + branch[along] : start + j;
      const int64_t block = blocks[position / p.block_size], slot = position % p.block_size;
      const T* key = p.k_cache + block * p.k_strides.block + kv_head * p.k_strides.head;
      const T* value = p.v_cache + block * p.v_strides.block + kv_head * p.v_strides.head;
      const int64_t left = tree && !branched && -along < columns - j ? -along : columns - j;
      const int run = branched ? 1 : (int)(left < p.block_size - slot ? left : p.block_size - slot);
      for (int i = 0; i < run; ++i) {
        keys[j + i] = key + (slot + i) * p.k_strides.slot;
        values[j + i] = value + (slot + i) * p.v_strides.slot;
      }
      j += run;
    }
  }

  int locate_next(const T** keys, const T** values) const {
    if (item >= last)
      return 0;
    const PagedRows next(p, item + 1, last);
    const int64_t start = next.span.split < 0 ? 0 : next.span.split * kSplitPositions;
    const int columns = tile_columns(start, next.end());
    next.locate(start, columns, keys, values);
    return columns;
  }

  void target(int r, T*& o, float*& lse) const {
    o = p.o + row(r) * p.head_dim;
    lse = p.lse + row(r);
  }

  // For fold_splits.
  void partial(int r, float*& o, float*& max, float*& total) const {
    const int64_t place = row(r) * p.max_splits + span.split;
    o = p.partial_o + place * p.head_dim;
    max = p.partial_max + place;
    total = p.partial_total + place;
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
