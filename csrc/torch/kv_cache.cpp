// The paged cache: tensors to Params to kernels. Slots and blocks are checked before the threads start.
#include "kv_cache.h"
#include "layers.h"
#include "rope.h"

namespace kvkeye {
namespace {

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
               const Tensor& slot_mapping, const std::optional<Tensor>& k_scales,
               const std::optional<Tensor>& v_scales) {
  refuse_scales("append_kv", k_scales, v_scales);
  const Cache cache = cache_of("append_kv", k_cache, v_cache);
  slots_of("append_kv", slot_mapping, slot_mapping.numel(), cache);
  const Append append = append_of(k, v, k_cache, v_cache, slot_mapping, k_cache.scalar_type());
  for_items(append.tokens, cache.heads * cache.dim,
            [&](int64_t begin, int64_t end) { cpu::append_kv(append.params, begin, end); });
}

} // namespace

Tensor qk_norm_mrope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                            const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& slot_mapping, const std::vector<int64_t>& sections, double theta,
                            double eps, const std::optional<Tensor>& k_scales,
                            const std::optional<Tensor>& v_scales) {
  const char* op = "qk_norm_mrope_append";
  refuse_scales(op, k_scales, v_scales);
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

namespace {

void copy_blocks(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const Copy copy = copy_of(k_cache, v_cache, block_pairs);
  const int64_t* block = copy.params.block_pairs;
  for (int64_t i = 0; i < 2 * copy.pairs; ++i)
    require(block[i] >= 0 && block[i] < copy.params.blocks, "copy_blocks: block_pairs[", i / 2,
            "] names block ", block[i], "; the cache has ", copy.params.blocks, " blocks.");
  for_items(copy.pairs, copy.params.block_bytes / 2,
            [&](int64_t begin, int64_t end) { cpu::copy_blocks(copy.params, begin, end); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("qk_norm_mrope_append", TORCH_BOX(&qk_norm_mrope_append));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
}

} // namespace kvkeye
