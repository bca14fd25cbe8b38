// Attention over a paged cache.
#include "attention_tile.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Queries and views of a span for one KV head.
template <class T>
void load_span(const PagedAttentionParams<T>& p, const PagedSpan& span, int64_t kv_head, Rows& rows) {
  const int64_t group = p.num_q_heads / p.num_kv_heads, context = p.context_lens[span.sequence];
  const int64_t first = p.cu_seqlens_q[span.sequence], fresh = p.cu_seqlens_q[span.sequence + 1] - first;
  const uint64_t all = fresh >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << fresh) - 1;
  rows.count = (int)((span.end - span.begin) * group);
  for (int r = 0; r < rows.count; ++r) {
    const int64_t token = span.begin + r / group, head = kv_head * group + r % group;
    load_row(p.q + token * p.q_strides.token + head * p.q_strides.head, p.head_dim, rows.q + r * rows.width);
    if (p.tree_mask != nullptr)
      rows.views[r] = {context - fresh, (uint64_t)p.tree_mask[token] & all};
    else
      rows.views[r] = {context - fresh + (token - first) + 1, 0};
  }
}

// The state of each row after one split, for fold_splits.
template <class T>
void store_partial(const PagedAttentionParams<T>& p, const PagedSpan& span, int64_t kv_head,
                   const Rows& rows) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  for (int r = 0; r < rows.count; ++r) {
    const int64_t row = (span.begin + r / group) * p.num_q_heads + kv_head * group + r % group;
    const int64_t place = row * p.max_splits + span.split;
    p.partial_max[place] = rows.max[r];
    p.partial_total[place] = sum(load(rows.total + r * kLanes));
    const float* out = rows.out + r * rows.width;
    for_vectors(rows.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      store(p.partial_o + place * rows.dim + i, load(out + i, lanes), lanes);
    });
  }
}

} // namespace

template <class T> void paged_attention(const PagedAttentionParams<T>& p, int64_t begin, int64_t end) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  Rows rows(p.scratch, group > kQueryRows ? group : kQueryRows, p.head_dim);
  for (int64_t item = begin; item < end; ++item) {
    const PagedSpan& span = p.spans[item / p.num_kv_heads];
    const int64_t kv_head = item % p.num_kv_heads, context = p.context_lens[span.sequence];
    load_span(p, span, kv_head, rows);
    const int32_t* blocks = p.block_table + span.sequence * p.max_blocks;
    const auto locate = [&](int64_t start, int count, const T** keys, const T** values) {
      for (int j = 0; j < count; ++j) {
        const int64_t block = blocks[(start + j) / p.block_size], slot = (start + j) % p.block_size;
        keys[j] =
            p.k_cache + block * p.k_strides.block + kv_head * p.k_strides.head + slot * p.k_strides.slot;
        values[j] =
            p.v_cache + block * p.v_strides.block + kv_head * p.v_strides.head + slot * p.v_strides.slot;
      }
    };
    const int64_t fresh_end = p.cu_seqlens_q[span.sequence + 1];
    // Without a tree, the last row of the span sees the most.
    const int64_t seen = p.tree_mask != nullptr ? context : context - (fresh_end - span.end);
    if (span.split >= 0) {
      const int64_t from = span.split * kSplitPositions, to = from + kSplitPositions;
      attend_split<T>(rows, from, to < seen ? to : seen, p.softmax_scale, locate);
      store_partial(p, span, kv_head, rows);
      continue;
    }
    const auto target = [&](int r, T*& o, float*& lse) {
      const int64_t row = (span.begin + r / group) * p.num_q_heads + kv_head * group + r % group;
      o = p.o + row * p.head_dim;
      lse = p.lse + row;
    };
    attend<T>(rows, seen, p.softmax_scale, locate, target);
  }
}

template <class T> void fold_splits(const FoldSplitsParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  float* out = arena.take(round_up(p.head_dim));
  for (int64_t row = begin; row < end; ++row) {
    State state{out, -INFINITY, 0.0f};
    clear(out, round_up(p.head_dim), 0.0f);
    for (int64_t split = 0; split < p.num_splits[row / p.num_q_heads]; ++split) {
      const int64_t place = row * p.max_splits + split;
      fold(state, p.partial_o + place * p.head_dim, p.partial_max[place], p.partial_total[place], p.head_dim);
    }
    finish(state, p.head_dim, p.o + row * p.head_dim, p.lse + row);
  }
}

KVKEYE_INSTANTIATE(paged_attention, PagedAttentionParams)
KVKEYE_INSTANTIATE(fold_splits, FoldSplitsParams)

} // namespace kvkeye::KVKEYE_ISA
