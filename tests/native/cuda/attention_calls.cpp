#include "case.h"
#include "kvkeye/attention_cuda.h"

#include <type_traits>

using namespace kvkeye;

namespace {

template <class T> int attend(host_cuda::Case& c) {
  PagedCudaParams<T> p{};
  if constexpr (std::is_same_v<T, e4m3>) {
    p.k_scales = c.buffer<float>("k_scales");
    p.v_scales = c.buffer<float>("v_scales");
  }
  p.q = c.buffer<bf16>("q") + c.number("q_offset");
  p.k_cache = c.buffer<T>("k_cache");
  p.v_cache = c.buffer<T>("v_cache");
  p.o = c.buffer<bf16>("o");
  p.lse = c.buffer<float>("lse");
  p.block_table = c.buffer<int32_t>("block_table");
  p.cu_seqlens_q = c.buffer<int32_t>("cu_seqlens_q");
  p.context_lens = c.buffer<int32_t>("context_lens");
  p.tree_mask = c.number("tree") != 0 ? c.buffer<int64_t>("tree_mask") : nullptr;
  p.q_token_stride = c.number("q_token_stride");
  p.q_head_stride = c.number("q_head_stride");
  p.num_tokens = (int32_t)c.number("tokens");
  p.num_sequences = (int32_t)c.number("sequences");
  p.num_q_heads = (int32_t)c.number("q_heads");
  p.num_kv_heads = (int32_t)c.number("kv_heads");
  p.num_blocks = (int32_t)c.number("blocks");
  p.block_size = (int32_t)c.number("block_size");
  p.max_blocks = (int32_t)c.number("max_blocks");
  p.softmax_scale = (float)((double)c.number("scale_billionths") * 1e-9);
  const int64_t dim = c.number("head_dim");
  PagedCudaPlan plan = paged_cuda_plan(p.num_tokens, p.num_sequences, p.num_q_heads, p.num_kv_heads, dim,
                                       (int64_t)p.max_blocks * p.block_size);
  if (c.number("in_one_walk") != 0)
    plan.splits = 1;
  // As the binding allocates: of the exact sizes, partial results unwritten.
  const size_t states = (size_t)p.num_tokens * (size_t)p.num_q_heads * (size_t)plan.splits;
  const size_t counts = (size_t)plan.row_tiles * (size_t)p.num_kv_heads;
  const bool side_by_side = plan.splits > 1;
  host_cuda::Scratch<float> partial_o("partial_o", side_by_side ? states * (size_t)dim : 0);
  host_cuda::Scratch<float> partial_state("partial_state", side_by_side ? 2 * states : 0);
  host_cuda::Scratch<int32_t> arrivals("arrivals", counts, 0);
  p.partial_o = partial_o.get();
  p.partial_state = partial_state.get();
  p.arrivals = arrivals.get();
  int status = cuda::paged_attention(p, plan, dim, nullptr);
  // Again, as a graph replays it: with the counts that the first run left.
  if (status == 0 && c.number("replay") != 0)
    status = cuda::paged_attention(p, plan, dim, nullptr);
  for (size_t i = 0; i < counts; ++i)
    if (arrivals.get()[i] != 0)
      return 1000;
  return status;
}

} // namespace

KVKEYE_CALL(paged_attention) {
  return c.number("fp8") != 0 ? attend<e4m3>(c) : attend<bf16>(c);
}
