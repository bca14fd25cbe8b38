// Attention over packed sequences, forward and backward, and over a paged cache: one unit, since they share
// kernels that take a compiler long.
#include "attention_backward.h"
#include "attention_packed.h"
#include "attention_paged.h"
#include "attention_tile.h"

namespace kvkeye::KVKEYE_ISA {

template <class T> void varlen_attention(const VarlenAttentionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const PackedRows<T> rows(p, p.spans[item % p.num_spans], item / p.num_spans);
    attend<T>(rows, p.head_dim, p.softmax_scale, rows.end(), -1, p.scratch);
  }
}

template <class T>
void varlen_attention_backward(const VarlenAttentionBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2)
      if (fast_bf16_pairs()) {
        Sequence<T, Paired>(p, item).run();
        continue;
      }
#endif
    Sequence<T, Single>(p, item).run();
  }
}

template <class T> void paged_attention(const PagedAttentionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const PagedRows<T> rows(p, item, end - 1);
    attend<T>(rows, p.head_dim, p.softmax_scale, rows.end(), rows.span.split, p.scratch);
  }
}

template <class T> void fold_splits(const FoldSplitsParams<T>& p, int64_t begin, int64_t end) {
  const int64_t width = round_up(p.head_dim);
  Arena arena(p.scratch);
  float *out = arena.take(width), *split_out = arena.take(width);
  for (int64_t row = begin; row < end; ++row) {
    Totals sum{splat(-INFINITY), Vf{}};
    clear(out, width, 0.0f);
    for (int64_t split = 0; split < p.num_splits[row / p.num_q_heads]; ++split) {
      const int64_t place = row * p.max_splits + split;
      const Joint joint = join(sum, {splat(p.partial_max[place]), splat(p.partial_total[place])});
      load_row(p.partial_o + place * p.head_dim, p.head_dim, split_out);
      scale_add(out, split_out, width, joint.keep[0], joint.add[0]);
    }
    finish_row(out, p.head_dim, sum.max[0], sum.total[0], p.o + row * p.head_dim, p.lse + row);
  }
}

KVKEYE_INSTANTIATE(varlen_attention, VarlenAttentionParams)
KVKEYE_INSTANTIATE(varlen_attention_backward, VarlenAttentionBackwardParams)
KVKEYE_INSTANTIATE(paged_attention, PagedAttentionParams)
KVKEYE_INSTANTIATE(fold_splits, FoldSplitsParams)

} // namespace kvkeye::KVKEYE_ISA
