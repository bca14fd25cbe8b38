// Attention over a paged cache: tensors to Params to kernels.
#include "heads.h"
#include "kvkeye/attention.h"
#include "layers.h"

#include <optional>

namespace kvkeye {
namespace {

constexpr const char* kOp = "paged_attention";
// Splits run on their own, at the price of storing their partial results, while those stay this small (16
// MiB).
constexpr int64_t kPartialFloats = 4 << 20;
constexpr int64_t kTreeRows = 64;

// The batch on the host side.
struct Batch {
  Tensor block_table, cu_seqlens_q, context_lens;
  int64_t sequences, max_blocks, max_splits;
  const int32_t *blocks, *bounds, *contexts;

  int64_t splits(int64_t b) const { return (contexts[b] + kSplitPositions - 1) / kSplitPositions; }
};

void check_sequence(const Batch& batch, int64_t b, int64_t num_blocks, int64_t block_size, bool tree) {
  const int64_t context = batch.contexts[b], rows = batch.bounds[b + 1] - batch.bounds[b];
  require(context >= 0 && context <= batch.max_blocks * block_size, kOp, ": context_lens[", b,
          "] = ", context, "; expected 0 to ", batch.max_blocks * block_size, ", what ", batch.max_blocks,
          " blocks of ", block_size, " hold.");
  require(!tree || rows <= kTreeRows, kOp, ": sequence ", b, " has ", rows, " rows; with tree_mask at most ",
          kTreeRows, " are allowed.");
  for (int64_t i = 0; i < (context + block_size - 1) / block_size; ++i) {
    const int32_t block = batch.blocks[b * batch.max_blocks + i];
    require(block >= 0 && block < num_blocks, kOp, ": block_table[", b, ", ", i, "] = ", block,
            "; expected 0 to ", num_blocks - 1, ".");
  }
}

Batch check_batch(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                  const Tensor& cu_seqlens_q, const Tensor& context_lens, bool tree) {
  const Argument table{kOp, "block_table", block_table}, contexts{kOp, "context_lens", context_lens};
  table.has_dim(2, "[B, M]");
  table.has_dtype(ScalarType::Int);
  check_bounds({kOp, "cu_seqlens_q", cu_seqlens_q}, q.size(0));
  contexts.has_shape({cu_seqlens_q.size(0) - 1});
  contexts.has_dtype(ScalarType::Int);
  Batch batch{
      dense(block_table), dense(cu_seqlens_q), dense(context_lens), 0, 0, 1, nullptr, nullptr, nullptr};
  batch.sequences = context_lens.size(0);
  table.has_shape({batch.sequences, block_table.size(1)});
  batch.max_blocks = block_table.size(1);
  batch.blocks = read<int32_t>(batch.block_table);
  batch.bounds = read<int32_t>(batch.cu_seqlens_q);
  batch.contexts = read<int32_t>(batch.context_lens);
  for (int64_t b = 0; b < batch.sequences; ++b) {
    check_sequence(batch, b, k_cache.size(0), k_cache.size(2), tree);
    batch.max_splits = std::max(batch.max_splits, batch.splits(b));
  }
  return batch;
}

// One past the last token that may share a span with `begin`: each sees what the one before it sees, and rows
// after that. Branches of a tree go apart.
int64_t end_of_branch(const int64_t* tree_mask, int64_t begin, int64_t end) {
  int64_t token = begin + 1;
  for (; tree_mask != nullptr && token < end; ++token) {
    const uint64_t before = (uint64_t)tree_mask[token - 1], seen = (uint64_t)tree_mask[token];
    const uint64_t upto = before == 0 ? 0 : ~(uint64_t)0 >> __builtin_clzll(before);
    if ((seen & upto) != before)
      return token;
  }
  return end;
}

// Splits that end before the new tokens are the same for all branches of a tree, which read them together.
std::vector<PagedSpan> spans_of(const Batch& batch, const int64_t* tree_mask, int64_t group, bool by_split) {
  std::vector<PagedSpan> spans;
  for (int64_t b = 0; b < batch.sequences; ++b) {
    const int64_t first = batch.bounds[b], last = batch.bounds[b + 1],
                  tokens = span_tokens(last - first, group);
    const int64_t common =
        by_split && tree_mask != nullptr ? (batch.contexts[b] - (last - first)) / kSplitPositions : 0;
    for (int64_t split = 0; split < common; ++split)
      for (int64_t begin = first; begin < last; begin += tokens)
        spans.push_back({begin, std::min(begin + tokens, last), b, split});
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = end_of_branch(tree_mask, begin, std::min(begin + tokens, last));
      if (!by_split)
        spans.push_back({begin, end, b, -1});
      for (int64_t split = common; by_split && split < batch.splits(b); ++split)
        spans.push_back({begin, end, b, split});
    }
  }
  return spans;
}

// The second pass where splits ran on their own.
template <class T> void fold(const PagedAttentionParams<T>& attention, const Batch& batch, int64_t tokens) {
  std::vector<int32_t> num_splits(tokens);
  for (int64_t b = 0; b < batch.sequences; ++b)
    std::fill(num_splits.begin() + batch.bounds[b], num_splits.begin() + batch.bounds[b + 1],
              (int32_t)batch.splits(b));
  FoldSplitsParams<T> params{};
  params.partial_o = attention.partial_o;
  params.partial_max = attention.partial_max;
  params.partial_total = attention.partial_total;
  params.num_splits = num_splits.data();
  params.o = attention.o;
  params.lse = attention.lse;
  params.num_q_heads = attention.num_q_heads;
  params.head_dim = attention.head_dim;
  params.max_splits = attention.max_splits;
  for_items_with_scratch(params, tokens * params.num_q_heads, params.max_splits * params.head_dim,
                         fold_scratch(params.head_dim),
                         [](const auto& p, int64_t begin, int64_t end) { cpu::fold_splits(p, begin, end); });
}

template <class T> void run(PagedAttentionParams<T>& params, const Batch& batch, int64_t tokens) {
  const int64_t group = params.num_q_heads / params.num_kv_heads, dim = params.head_dim;
  const int64_t states = tokens * params.num_q_heads * batch.max_splits;
  const bool by_split = batch.max_splits > 1 && states * (dim + 2) <= kPartialFloats;
  const std::vector<PagedSpan> spans = spans_of(batch, params.tree_mask, group, by_split);
  const std::unique_ptr<float[]> partial(by_split ? new float[states * (dim + 2)] : nullptr);
  params.spans = spans.data();
  params.max_splits = batch.max_splits;
  if (by_split) {
    params.partial_o = partial.get();
    params.partial_max = partial.get() + states * dim;
    params.partial_total = params.partial_max + states;
  }
  int64_t most_tokens = 0;
  for (const PagedSpan& span : spans)
    most_tokens = std::max(most_tokens, span.end - span.begin);
  const int64_t cost = kTilePositions * dim * group, items = (int64_t)spans.size() * params.num_kv_heads;
  // The heads of a split lie side by side in the cache: read together, unless that leaves a thread idle.
  const int64_t turns = 4 * torch::stable::get_num_threads();
  const int64_t together = by_split ? std::clamp<int64_t>(items / turns, 1, params.num_kv_heads) : 1;
  for_items_with_scratch(
      params, items, cost, attend_scratch(most_tokens * group, dim),
      [](const auto& p, int64_t begin, int64_t end) { cpu::paged_attention(p, begin, end); }, together);
  if (by_split)
    fold(params, batch, tokens);
}

} // namespace

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& cu_seqlens_q,
                                           const Tensor& context_lens, const std::optional<Tensor>& tree_mask,
                                           double softmax_scale, const std::optional<Tensor>& k_scales,
                                           const std::optional<Tensor>& v_scales) {
  refuse_scales(kOp, k_scales, v_scales);
  Argument{kOp, "q", q}.has_dim(3, "[T, Hq, D]");
  Argument{kOp, "k_cache", k_cache}.has_dim(4, "[N, Hkv, P, D]");
  const int64_t dim = q.size(2), kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  for (const Argument& cache : {Argument{kOp, "k_cache", k_cache}, Argument{kOp, "v_cache", v_cache}}) {
    cache.has_shape({k_cache.size(0), kv_heads, block_size, dim});
    cache.has_dtype(q.scalar_type());
  }
  require(block_size > 0, kOp, ": k_cache has shape ", shape_text(k_cache),
          "; blocks must hold at least one token.");
  group_of(kOp, q.size(1), kv_heads);
  if (tree_mask.has_value()) {
    Argument{kOp, "tree_mask", *tree_mask}.has_shape({q.size(0)});
    Argument{kOp, "tree_mask", *tree_mask}.has_dtype(ScalarType::Long);
  }
  const Batch batch = check_batch(q, k_cache, block_table, cu_seqlens_q, context_lens, tree_mask.has_value());
  const Tensor o = empty_dense(q), lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const Tensor bits = tree_mask.has_value() ? dense(*tree_mask) : lse;
  const Heads queries = as_heads(q);
  const Tensor keys = k_cache.stride(3) == 1 ? k_cache : torch::stable::contiguous(k_cache);
  const Tensor values = v_cache.stride(3) == 1 ? v_cache : torch::stable::contiguous(v_cache);
  with_type({kOp, "q", q}, [&](auto type) {
    using T = decltype(type);
    PagedAttentionParams<T> params{};
    params.q = read<T>(queries.tensor);
    params.k_cache = read<T>(keys);
    params.v_cache = read<T>(values);
    params.o = write<T>(o);
    params.lse = write<float>(lse);
    params.block_table = batch.blocks;
    params.cu_seqlens_q = batch.bounds;
    params.context_lens = batch.contexts;
    params.tree_mask = tree_mask.has_value() ? read<int64_t>(bits) : nullptr;
    params.q_strides = queries.strides;
    params.k_strides = {keys.stride(0), keys.stride(1), keys.stride(2)};
    params.v_strides = {values.stride(0), values.stride(1), values.stride(2)};
    params.num_q_heads = q.size(1);
    params.num_kv_heads = kv_heads;
    params.head_dim = dim;
    params.block_size = block_size;
    params.max_blocks = batch.max_blocks;
    params.softmax_scale = (float)softmax_scale;
    run(params, batch, q.size(0));
  });
  return {o, lse};
}

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

} // namespace kvkeye
