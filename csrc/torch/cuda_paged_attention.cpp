// Attention over a paged cache on the GPU: tensors to Params to the launcher. Reads no tensor value on the
// host and waits for nothing.
#include "cuda_launch.h"
#include "cuda_scales.h"
#include "kvkeye/attention_cuda.h"

#include <optional>
#include <tuple>
#include <type_traits>

namespace kvkeye {
namespace {

constexpr const char* kOp = "paged_attention";
constexpr int64_t kMostRows = (int64_t)1 << 31; // of q and of a cache: their numbers are int32 in the kernel

// [T, Hq, D] with dense heads whose addresses and strides are multiples of 4 bytes; a copy where they are
// not.
Tensor queries_of(const Tensor& q) {
  const bool usable = q.stride(2) == 1 && q.stride(0) % 2 == 0 && q.stride(1) % 2 == 0;
  return aligned(usable ? q : torch::stable::contiguous(q), 4);
}

void check_cache(const char* name, const Tensor& cache, const Tensor& k_cache, const Tensor& q) {
  const Argument argument{kOp, name, cache};
  argument.has_shape({k_cache.size(0), k_cache.size(1), k_cache.size(2), q.size(2)});
  argument.has_dtype(is_e4m3(k_cache) ? ScalarType::Float8_e4m3fn : q.scalar_type());
  require(cache.is_contiguous() && (uintptr_t)read<char>(cache) % 16 == 0, kOp, ": ", name,
          " must be contiguous and aligned to 16 bytes; the GPU kernel copies whole rows.");
  require(cache.size(0) * cache.size(1) * cache.size(2) < kMostRows, kOp, ": ", name, " has shape ",
          shape_text(cache), "; the GPU kernel takes fewer than 2^31 rows.");
}

void check_integers(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  const Argument argument{kOp, name, tensor};
  argument.has_shape(shape);
  argument.has_dtype(ScalarType::Int);
}

void check_arguments(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_table,
                     const Tensor& cu_seqlens_q, const Tensor& context_lens,
                     const std::optional<Tensor>& tree_mask, const Scales& scales) {
  const Argument queries{kOp, "q", q};
  queries.has_dim(3, "[T, Hq, D]");
  queries.has_dtype(ScalarType::BFloat16);
  Argument{kOp, "k_cache", k_cache}.has_dim(4, "[N, Hkv, P, D]");
  check_cache("k_cache", k_cache, k_cache, q);
  check_cache("v_cache", v_cache, k_cache, q);
  check_scales(kOp, k_cache, scales);
  const int64_t kv_heads = k_cache.size(1), dim = q.size(2);
  require(kv_heads > 0 && q.size(1) % kv_heads == 0, kOp, ": ", q.size(1),
          " query heads are not a multiple of ", kv_heads, " KV heads.");
  require(k_cache.size(2) > 0, kOp, ": k_cache has shape ", shape_text(k_cache),
          "; blocks must hold at least one token.");
  require(dim == 64 || dim == 128 || (!is_e4m3(k_cache) && (dim == 72 || dim == 80)), kOp,
          ": the head size is ", dim,
          "; the GPU kernel takes 64, 72, 80 and 128, over Float8_e4m3fn 64 and 128.");
  require(q.size(0) * q.size(1) < kMostRows, kOp, ": q has shape ", shape_text(q),
          "; the GPU kernel takes fewer than 2^31 rows.");
  Argument{kOp, "block_table", block_table}.has_dim(2, "[B, M]");
  const int64_t sequences = context_lens.numel();
  check_integers("block_table", block_table, {sequences, block_table.size(1)});
  check_integers("cu_seqlens_q", cu_seqlens_q, {sequences + 1});
  check_integers("context_lens", context_lens, {sequences});
  if (tree_mask.has_value()) {
    Argument{kOp, "tree_mask", *tree_mask}.has_shape({q.size(0)});
    Argument{kOp, "tree_mask", *tree_mask}.has_dtype(ScalarType::Long);
  }
}

// What blocks of threads leave for each other, from torch's allocator: a captured graph keeps it.
struct Workspace {
  Tensor partial_o, partial_state, arrivals;

  Workspace(const Tensor& q, const PagedCudaPlan& plan, int64_t kv_heads) {
    const bool side_by_side = plan.splits > 1;
    const int64_t states = side_by_side ? q.size(0) * q.size(1) * plan.splits : 0;
    partial_o = empty(q, {states, q.size(2)}, ScalarType::Float);
    partial_state = empty(q, {states, 2}, ScalarType::Float);
    arrivals = empty(q, {side_by_side ? plan.row_tiles : 0, kv_heads}, ScalarType::Int);
    if (side_by_side)
      torch::stable::zero_(arrivals);
  }
};

template <class T> void read_scales(PagedCudaParams<T>& params, const Scales& scales) {
  if constexpr (std::is_same_v<T, e4m3>) {
    params.k_scales = read<float>(*scales.k);
    params.v_scales = read<float>(*scales.v);
  }
}

std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& cu_seqlens_q,
                                           const Tensor& context_lens, const std::optional<Tensor>& tree_mask,
                                           double softmax_scale, const std::optional<Tensor>& k_scales,
                                           const std::optional<Tensor>& v_scales) {
  const Scales scales{k_scales, v_scales};
  check_arguments(q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens, tree_mask, scales);
  const Launch launch(q);
  const Tensor o = empty_dense(q), lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const Tensor queries = queries_of(q), table = dense(block_table), bounds = dense(cu_seqlens_q),
               contexts = dense(context_lens), bits = tree_mask.has_value() ? dense(*tree_mask) : lse;
  const int64_t kv_heads = k_cache.size(1), block_size = k_cache.size(2), dim = q.size(2);
  const PagedCudaPlan plan =
      paged_cuda_plan(q.size(0), contexts.numel(), q.size(1), kv_heads, dim, table.size(1) * block_size);
  const Workspace workspace(q, plan, kv_heads);
  with_cache_type<bf16>(k_cache, [&](auto type) {
    using T = decltype(type);
    PagedCudaParams<T> params{};
    read_scales(params, scales);
    params.q = read<bf16>(queries);
    params.k_cache = read<T>(k_cache);
    params.v_cache = read<T>(v_cache);
    params.o = write<bf16>(o);
    params.lse = write<float>(lse);
    params.block_table = read<int32_t>(table);
    params.cu_seqlens_q = read<int32_t>(bounds);
    params.context_lens = read<int32_t>(contexts);
    params.tree_mask = tree_mask.has_value() ? read<int64_t>(bits) : nullptr;
    params.partial_o = write<float>(workspace.partial_o);
    params.partial_state = write<float>(workspace.partial_state);
    params.arrivals = write<int32_t>(workspace.arrivals);
    params.q_token_stride = queries.stride(0);
    params.q_head_stride = queries.stride(1);
    params.num_tokens = (int32_t)q.size(0);
    params.num_sequences = (int32_t)contexts.numel();
    params.num_q_heads = (int32_t)q.size(1);
    params.num_kv_heads = (int32_t)kv_heads;
    params.num_blocks = (int32_t)k_cache.size(0);
    params.block_size = (int32_t)block_size;
    params.max_blocks = (int32_t)table.size(1);
    params.softmax_scale = (float)softmax_scale;
    check_launch(kOp, cuda::paged_attention(params, plan, dim, launch.stream));
  });
  return {o, lse};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

} // namespace kvkeye
