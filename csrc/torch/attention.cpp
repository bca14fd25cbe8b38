// Attention over packed sequences: tensors to Params to kernels.
#include "kvkeye/attention.h"
#include "heads.h"

namespace kvkeye {
namespace {

constexpr const char* kForward = "varlen_attention";
constexpr const char* kBackward = "varlen_attention_backward";

// Refuses what does not fit together; the number of query heads of a group is returned.
int64_t check_packed(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& cu_seqlens) {
  Argument{op, "q", q}.has_dim(3, "[T, Hq, D]");
  Argument{op, "k", k}.has_dim(3, "[T, Hkv, D]");
  Argument{op, "k", k}.has_shape({q.size(0), k.size(1), q.size(2)});
  Argument{op, "v", v}.has_shape({q.size(0), k.size(1), q.size(2)});
  Argument{op, "k", k}.has_dtype(q.scalar_type());
  Argument{op, "v", v}.has_dtype(q.scalar_type());
  check_bounds({op, "cu_seqlens", cu_seqlens}, q.size(0));
  return group_of(op, q.size(1), k.size(1));
}

std::vector<QuerySpan> spans_of(const int32_t* bounds, int64_t sequences, int64_t group) {
  std::vector<QuerySpan> spans;
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t tokens = span_tokens(bounds[b + 1] - bounds[b], group);
    for (int64_t begin = bounds[b]; begin < bounds[b + 1]; begin += tokens)
      spans.push_back({begin, std::min<int64_t>(begin + tokens, bounds[b + 1]), bounds[b], bounds[b + 1]});
  }
  return spans;
}

int64_t most_tokens(const std::vector<QuerySpan>& spans) {
  int64_t most = 0;
  for (const QuerySpan& span : spans)
    most = std::max(most, span.end - span.begin);
  return most;
}

int64_t longest_of(const int32_t* bounds, int64_t sequences) {
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b)
    longest = std::max<int64_t>(longest, bounds[b + 1] - bounds[b]);
  return longest;
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens, int64_t /*max_seqlen*/, bool causal,
                                            double softmax_scale) {
  const int64_t group = check_packed(kForward, q, k, v, cu_seqlens);
  const int64_t dim = q.size(2), kv_heads = k.size(1);
  const Tensor o = empty_dense(q), lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  const Tensor bounds = dense(cu_seqlens);
  const int64_t sequences = bounds.size(0) - 1;
  const std::vector<QuerySpan> spans = spans_of(read<int32_t>(bounds), sequences, group);
  const Heads queries = as_heads(q), keys = as_heads(k), values = as_heads(v);
  with_type({kForward, "q", q}, [&](auto type) {
    using T = decltype(type);
    VarlenAttentionParams<T> params{};
    params.q = read<T>(queries.tensor);
    params.k = read<T>(keys.tensor);
    params.v = read<T>(values.tensor);
    params.o = write<T>(o);
    params.lse = write<float>(lse);
    params.spans = spans.data();
    params.q_strides = queries.strides;
    params.k_strides = keys.strides;
    params.v_strides = values.strides;
    params.num_spans = (int64_t)spans.size();
    params.num_q_heads = q.size(1);
    params.num_kv_heads = kv_heads;
    params.head_dim = dim;
    params.softmax_scale = (float)softmax_scale;
    params.causal = causal;
    const int64_t cost = query_rows() * kTilePositions * dim;
    for_items_with_scratch(
        params, params.num_spans * kv_heads, cost, attend_scratch(most_tokens(spans) * group, dim),
        [](const auto& p, int64_t begin, int64_t end) { cpu::varlen_attention(p, begin, end); });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor>
varlen_attention_backward(const Tensor& grad_o, const Tensor& grad_lse, const Tensor& q, const Tensor& k,
                          const Tensor& v, const Tensor& cu_seqlens, int64_t /*max_seqlen*/, bool causal,
                          double softmax_scale, const Tensor& o, const Tensor& lse) {
  const int64_t group = check_packed(kBackward, q, k, v, cu_seqlens);
  const int64_t dim = q.size(2), kv_heads = k.size(1);
  for (const Argument& argument : {Argument{kBackward, "grad_o", grad_o}, Argument{kBackward, "o", o}}) {
    argument.has_shape({q.size(0), q.size(1), dim});
    argument.has_dtype(q.scalar_type());
  }
  for (const Argument& argument :
       {Argument{kBackward, "grad_lse", grad_lse}, Argument{kBackward, "lse", lse}}) {
    argument.has_shape({q.size(0), q.size(1)});
    argument.has_dtype(ScalarType::Float);
  }
  const Tensor grad_q = empty_dense(q), grad_k = empty_dense(k), grad_v = empty_dense(v);
  const Tensor bounds = dense(cu_seqlens), upstream = dense(grad_o), upstream_lse = dense(grad_lse);
  const Tensor outputs = dense(o), denominators = dense(lse);
  const Heads queries = as_heads(q), keys = as_heads(k), values = as_heads(v);
  with_type({kBackward, "q", q}, [&](auto type) {
    using T = decltype(type);
    VarlenAttentionBackwardParams<T> params{};
    params.grad_o = read<T>(upstream);
    params.grad_lse = read<float>(upstream_lse);
    params.q = read<T>(queries.tensor);
    params.k = read<T>(keys.tensor);
    params.v = read<T>(values.tensor);
    params.o = read<T>(outputs);
    params.lse = read<float>(denominators);
    params.grad_q = write<T>(grad_q);
    params.grad_k = write<T>(grad_k);
    params.grad_v = write<T>(grad_v);
    params.cu_seqlens = read<int32_t>(bounds);
    params.q_strides = queries.strides;
    params.k_strides = keys.strides;
    params.v_strides = values.strides;
    params.num_sequences = bounds.size(0) - 1;
    params.num_q_heads = q.size(1);
    params.num_kv_heads = kv_heads;
    params.head_dim = dim;
    params.softmax_scale = (float)softmax_scale;
    params.causal = causal;
    const int64_t longest = longest_of(params.cu_seqlens, params.num_sequences);
    for_items_with_scratch(
        params, params.num_sequences * kv_heads, longest * group * longest * dim,
        backward_scratch(longest, group, dim),
        [](const auto& p, int64_t begin, int64_t end) { cpu::varlen_attention_backward(p, begin, end); });
  });
  return {grad_q, grad_k, grad_v};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

} // namespace kvkeye
