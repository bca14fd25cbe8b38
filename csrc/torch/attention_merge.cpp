// Merging of partial attention results: tensors to Params to kernels.
#include "kvkeye/attention_merge.h"
#include "checks.h"

#include <tuple>

namespace kvkeye {
namespace {

struct States {
  Tensor o_a, lse_a, o_b, lse_b; // dense
  int64_t rows, dim;
};

Tensor checked_lse(const char* op, const char* name, const Tensor& lse, const Tensor& o) {
  const Argument argument{op, name, lse};
  argument.has_shape({o.size(0), o.size(1)});
  argument.has_dtype(ScalarType::Float);
  return dense(lse);
}

Tensor like_o(const char* op, const char* name, const Tensor& tensor, const Tensor& o) {
  const Argument argument{op, name, tensor};
  argument.has_shape_of("o_a", o);
  argument.has_dtype(o.scalar_type());
  return dense(tensor);
}

States states_of(const char* op, const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                 const Tensor& lse_b) {
  const Argument argument{op, "o_a", o_a};
  argument.has_dim(3, "[T, H, D]");
  return {dense(o_a),
          checked_lse(op, "lse_a", lse_a, o_a),
          like_o(op, "o_b", o_b, o_a),
          checked_lse(op, "lse_b", lse_b, o_a),
          o_a.size(0) * o_a.size(1),
          o_a.size(2)};
}

std::tuple<Tensor, Tensor> merge_attention_states(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b,
                                                  const Tensor& lse_b) {
  const char* op = "merge_attention_states";
  const States s = states_of(op, o_a, lse_a, o_b, lse_b);
  const Tensor o = empty_dense(o_a), lse = empty_dense(lse_a);
  with_type({op, "o_a", o_a}, [&](auto type) {
    using T = decltype(type);
    const MergeStatesParams<T> params{
        read<T>(s.o_a),    read<T>(s.o_b), read<float>(s.lse_a), read<float>(s.lse_b), write<T>(o),
        write<float>(lse), s.dim};
    for_items(s.rows, 3 * s.dim,
              [&](int64_t begin, int64_t end) { cpu::merge_attention_states(params, begin, end); });
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
merge_attention_states_backward(const Tensor& grad_o, const Tensor& grad_lse, const Tensor& o_a,
                                const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  const char* op = "merge_attention_states_backward";
  const States s = states_of(op, o_a, lse_a, o_b, lse_b);
  const Tensor upstream_o = like_o(op, "grad_o", grad_o, o_a);
  const Tensor upstream_lse = checked_lse(op, "grad_lse", grad_lse, o_a);
  const Tensor grad_o_a = empty_dense(o_a), grad_o_b = empty_dense(o_b);
  const Tensor grad_lse_a = empty_dense(lse_a), grad_lse_b = empty_dense(lse_b);
  with_type({op, "o_a", o_a}, [&](auto type) {
    using T = decltype(type);
    const MergeStatesBackwardParams<T> params{read<T>(upstream_o),
                                              read<float>(upstream_lse),
                                              read<T>(s.o_a),
                                              read<T>(s.o_b),
                                              read<float>(s.lse_a),
                                              read<float>(s.lse_b),
                                              write<T>(grad_o_a),
                                              write<T>(grad_o_b),
                                              write<float>(grad_lse_a),
                                              write<float>(grad_lse_b),
                                              s.dim};
    for_items(s.rows, 5 * s.dim,
              [&](int64_t begin, int64_t end) { cpu::merge_attention_states_backward(params, begin, end); });
  });
  return {grad_o_a, grad_lse_a, grad_o_b, grad_lse_b};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("merge_attention_states_backward", TORCH_BOX(&merge_attention_states_backward));
}

} // namespace kvkeye
