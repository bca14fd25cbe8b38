// The paged cache on the GPU: tensors to Params to launchers. Reads no tensor value on the host.
#include "cuda_launch.h"
#include "cuda_scales.h"
#include "kv_cache.h"
#include "kvkeye/rope_cuda.h"
#include "rope.h"

#include <algorithm>
#include <type_traits>

namespace kvkeye {
namespace {

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping, const std::optional<Tensor>& k_scales,
               const std::optional<Tensor>& v_scales) {
  const Scales scales{k_scales, v_scales};
  check_scales("append_kv", k_cache, scales);
  const bool quantizes = is_e4m3(k_cache);
  const Launch launch(k_cache);
  const Append append = append_of(k, v, k_cache, v_cache, slot_mapping,
                                  quantizes ? ScalarType::BFloat16 : k_cache.scalar_type());
  if (!quantizes)
    return check_launch("append_kv", cuda::append_kv(append.params, append.tokens, launch.stream));
  const QuantizeKvParams params{append.params, {write<float>(*k_scales), write<float>(*v_scales)}};
  check_launch("append_kv", cuda::quantize_kv(params, append.tokens, launch.stream));
}

void check_cache_writes(const char* op, const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& slot_mapping, const Cache& cache, int64_t dim) {
  const Argument keys{op, "k_cache", k_cache}, slots{op, "slot_mapping", slot_mapping};
  require(dim == 64 || dim == 128 || (dim == 256 && !is_e4m3(k_cache)), op, ": the head size is ", dim,
          "; the GPU kernel takes 64, 128 and 256, into Float8_e4m3fn 64 and 128.");
  keys.has_shape({cache.blocks, cache.heads, cache.block_size, dim});
  if (is_e4m3(k_cache))
    Argument{op, "qkv", qkv}.has_dtype(ScalarType::BFloat16);
  else
    keys.has_dtype(qkv.scalar_type());
  slots.has_shape({qkv.size(0)});
  slots.has_dtype(ScalarType::Long);
  require((uintptr_t)read<char>(k_cache) % 16 == 0 && (uintptr_t)read<char>(v_cache) % 16 == 0, op,
          ": the caches must start at a multiple of 16 bytes.");
}

// Rows whose addresses are multiples of 16 bytes.
Tensor aligned_rows(const Rows& rows) {
  const bool usable = rows.stride * (int64_t)rows.tensor.element_size() % 16 == 0;
  return aligned(usable ? rows.tensor : torch::stable::contiguous(rows.tensor), 16);
}

Tensor qk_norm_mrope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                            const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& slot_mapping, const std::vector<int64_t>& sections, double theta,
                            double eps, const std::optional<Tensor>& k_scales,
                            const std::optional<Tensor>& v_scales) {
  const char* op = "qk_norm_mrope_append";
  const Scales scales{k_scales, v_scales};
  const Launch launch(qkv);
  const Cache cache = cache_of(op, k_cache, v_cache);
  const Projection projection = projection_of(op, qkv, q_weight, k_weight, cache.heads);
  const int64_t tokens = qkv.size(0), dim = projection.dim;
  check_cache_writes(op, qkv, k_cache, v_cache, slot_mapping, cache, dim);
  check_scales(op, k_cache, scales);
  const Sections table = sections_of(op, positions, sections, theta, tokens, dim);
  const Tensor rows = aligned_rows(projection.qkv), slots = dense(slot_mapping),
               q_scale = aligned(projection.q_weight, 16), k_scale = aligned(projection.k_weight, 16);
  const Tensor q = empty(qkv, {tokens, projection.num_q_heads, dim});
  const auto start = [&](auto type, auto cache_type) {
    using T = decltype(type);
    using C = decltype(cache_type);
    QkNormMropeAppendCudaParams<T, C> params{};
    if constexpr (std::is_same_v<C, e4m3>) {
      params.k_scales = write<float>(*scales.k);
      params.v_scales = write<float>(*scales.v);
    }
    params.qkv = read<T>(rows);
    params.q_weight = read<T>(q_scale);
    params.k_weight = read<T>(k_scale);
    params.q = write<T>(q);
    params.k_cache = write<C>(k_cache);
    params.v_cache = write<C>(v_cache);
    params.positions = read<int64_t>(table.positions);
    params.slot_mapping = read<int64_t>(slots);
    params.tokens = tokens;
    params.stride = rows.is_contiguous() ? qkv.size(1) : projection.qkv.stride;
    params.slots = cache.blocks * cache.block_size;
    params.num_q_heads = (int32_t)projection.num_q_heads;
    params.num_kv_heads = (int32_t)cache.heads;
    params.block_size = (int32_t)cache.block_size;
    params.section_ends[0] = (int32_t)sections[0];
    params.section_ends[1] = (int32_t)(sections[0] + sections[1]);
    params.eps = (float)eps;
    std::copy(table.frequency.begin(), table.frequency.end(), params.frequency);
    check_launch(op, cuda::qk_norm_mrope_append(params, dim, launch.stream));
  };
  if (is_e4m3(k_cache))
    start(bf16{}, e4m3{});
  else
    with_type({op, "qkv", qkv}, [&](auto type) { start(type, type); });
  return q;
}

void copy_blocks(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const Launch launch(k_cache);
  const Copy copy = copy_of(k_cache, v_cache, block_pairs);
  check_launch("copy_blocks", cuda::copy_blocks(copy.params, copy.pairs, launch.stream));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("qk_norm_mrope_append", TORCH_BOX(&qk_norm_mrope_append));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
}

} // namespace kvkeye
