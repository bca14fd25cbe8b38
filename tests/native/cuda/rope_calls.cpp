#include "case.h"
#include "kvkeye/rope_cuda.h"

#include <cstring>
#include <type_traits>

using namespace kvkeye;

namespace {

template <class T, class C = T> int append(host_cuda::Case& c) {
  QkNormMropeAppendCudaParams<T, C> p{};
  if constexpr (!std::is_same_v<T, C>) {
    p.k_scales = c.buffer<float>("k_scales");
    p.v_scales = c.buffer<float>("v_scales");
  }
  p.qkv = c.buffer<T>("qkv") + c.number("offset");
  p.q_weight = c.buffer<T>("q_weight");
  p.k_weight = c.buffer<T>("k_weight");
  p.q = c.buffer<T>("q");
  p.k_cache = c.buffer<C>("k_cache");
  p.v_cache = c.buffer<C>("v_cache");
  p.positions = c.buffer<int64_t>("positions");
  p.slot_mapping = c.buffer<int64_t>("slot_mapping");
  p.tokens = c.number("tokens");
  p.stride = c.number("stride");
  p.slots = c.number("slots");
  p.num_q_heads = (int32_t)c.number("q_heads");
  p.num_kv_heads = (int32_t)c.number("kv_heads");
  p.block_size = (int32_t)c.number("block_size");
  p.section_ends[0] = (int32_t)c.number("first_end");
  p.section_ends[1] = (int32_t)c.number("second_end");
  p.eps = 1e-6f;
  const int64_t dim = c.number("head_dim");
  std::memcpy(p.frequency, c.buffer("frequency"), sizeof(float) * (size_t)dim / 2);
  return cuda::qk_norm_mrope_append(p, dim, nullptr);
}

} // namespace

KVKEYE_CALL(qk_norm_mrope_append) {
  if (c.number("fp8") != 0)
    return append<bf16, e4m3>(c);
  return c.number("bf16") != 0 ? append<bf16>(c) : append<float>(c);
}
