// The paged cache: tensors to Params to kernels. Slots and blocks are checked before the threads start.
#include "kvkeye/kv_cache.h"
#include "rope.h"

namespace kvkeye {
namespace {

struct Cache {
  int64_t blocks, heads, block_size, dim;
};

Cache cache_of(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  const Argument keys{op, "k_cache", k_cache}, values{op, "v_cache", v_cache};
  keys.has_dim(4, "[N, Hkv, P, D]");
  values.has_shape_of("k_cache", k_cache);
  values.has_dtype(k_cache.scalar_type());
  require(k_cache.is_contiguous() && v_cache.is_contiguous(), op,
          ": the caches must be contiguous, as they are written in place.");
  return {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)};
}

Tensor slots_of(const char* op, const Tensor& slot_mapping, int64_t tokens, const Cache& cache) {
  const Argument argument{op, "slot_mapping", slot_mapping};
  argument.has_shape({tokens});
  argument.has_dtype(ScalarType::Long);
  const Tensor slots = dense(slot_mapping);
  const int64_t* slot = read<int64_t>(slots);
  const int64_t limit = cache.blocks * cache.block_size;
  for (int64_t i = 0; i < tokens; ++i)
    require(slot[i] < limit, op, ": slot_mapping[", i, "] is ", slot[i], "; the cache has ", limit,
            " slots (", cache.blocks, " blocks of ", cache.block_size, ").");
  return slots;
}

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  const char* op = "append_kv";
  const Cache cache = cache_of(op, k_cache, v_cache);
  const int64_t tokens = slot_mapping.numel();
  const Tensor slots = slots_of(op, slot_mapping, tokens, cache);
  AppendKvParams params{};
  const int64_t size = (int64_t)k_cache.element_size();
  Tensor rows[2] = {k, v};
  for (int side = 0; side < 2; ++side) {
    const Argument argument{op, side == 0 ? "k" : "v", rows[side]};
    argument.has_shape({tokens, cache.heads, cache.dim});
    argument.has_dtype(k_cache.scalar_type());
    if (rows[side].stride(2) != 1)
      rows[side] = torch::stable::contiguous(rows[side]);
    params.source[side] = read<char>(rows[side]);
    params.cache[side] = write<char>(side == 0 ? k_cache : v_cache);
    params.token_stride[side] = rows[side].stride(0) * size;
    params.head_stride[side] = rows[side].stride(1) * size;
  }
  params.slot_mapping = read<int64_t>(slots);
  params.heads = cache.heads;
  params.block_size = cache.block_size;
  params.row_bytes = cache.dim * size;
  for_items(tokens, cache.heads * cache.dim,
            [&](int64_t begin, int64_t end) { cpu::append_kv(params, begin, end); });
}

Tensor qk_norm_mrope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                            const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& slot_mapping, const std::vector<int64_t>& sections, double theta,
                            double eps) {
  const char* op = "qk_norm_mrope_append";
  const Cache cache = cache_of(op, k_cache, v_cache);
  const Projection projection = projection_of(op, qkv, q_weight, k_weight, cache.heads);
  const int64_t tokens = qkv.size(0), dim = projection.dim;
  const Argument keys{op, "k_cache", k_cache};
  keys.has_shape({cache.blocks, cache.heads, cache.block_size, dim});
  keys.has_dtype(qkv.scalar_type());
  const Tensor slots = slots_of(op, slot_mapping, tokens, cache);
  const Sections table = sections_of(op, positions, sections, theta, tokens, dim);
  const Tensor q = empty(qkv, {tokens, projection.num_q_heads, dim});
  with_type({op, "qkv", qkv}, [&](auto type) {
    using T = decltype(type);
    auto params = norm_mrope_params<T>(projection, table, eps);
    params.q = write<T>(q);
    params.k_cache = write<T>(k_cache);
    params.v_cache = write<T>(v_cache);
    params.slot_mapping = read<int64_t>(slots);
    params.block_size = cache.block_size;
    for_items(tokens, 2 * params.stride,
              [&](int64_t begin, int64_t end) { cpu::qk_norm_mrope(params, begin, end); });
  });
  return q;
}

void copy_blocks(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const char* op = "copy_blocks";
  const Cache cache = cache_of(op, k_cache, v_cache);
  const Argument argument{op, "block_pairs", block_pairs};
  argument.has_dtype(ScalarType::Long);
  argument.has_dim(2, "[n, 2]");
  argument.has_shape({block_pairs.size(0), 2});
  const Tensor pairs = dense(block_pairs);
  const int64_t* block = read<int64_t>(pairs);
  for (int64_t i = 0; i < pairs.numel(); ++i)
    require(block[i] >= 0 && block[i] < cache.blocks, op, ": block_pairs[", i / 2, "] names block ", block[i],
            "; the cache has ", cache.blocks, " blocks.");
  const int64_t block_floats = cache.heads * cache.block_size * cache.dim;
  const CopyBlocksParams params{
      {write<char>(k_cache), write<char>(v_cache)}, block, block_floats * (int64_t)k_cache.element_size()};
  for_items(pairs.size(0), 2 * block_floats,
            [&](int64_t begin, int64_t end) { cpu::copy_blocks(params, begin, end); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("qk_norm_mrope_append", TORCH_BOX(&qk_norm_mrope_append));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
}

} // namespace kvkeye
