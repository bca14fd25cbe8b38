// Rotary embeddings: tensors to Params to kernels.
#include "rope.h"
#include "kvkeye/common/blocks.h"

#include <tuple>

namespace kvkeye {

namespace {

// x as heads with any token and head stride; copied only when a head is not contiguous.
struct Heads {
  Tensor tensor;
  int64_t tokens, heads, dim;

  template <class T> RotateParams<T> params(const Tensor& y, bool inverse) const {
    RotateParams<T> p{};
    p.x = read<T>(tensor);
    p.y = write<T>(y);
    p.heads = heads;
    p.dim = dim;
    p.token_stride = tensor.stride(0);
    p.head_stride = tensor.stride(1);
    p.inverse = inverse;
    return p;
  }
};

Heads heads_of(const char* op, const Tensor& x) {
  const Argument argument{op, "x", x};
  argument.has_dim(3, "[T, H, D]");
  require(x.size(2) % 2 == 0, op, ": x has shape ", shape_text(x), "; D must be even.");
  const bool usable = x.stride(2) == 1 || x.size(2) <= 1;
  return {usable ? x : torch::stable::contiguous(x), x.size(0), x.size(1), x.size(2)};
}

Tensor run_rope_2d(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse) {
  const Heads heads = heads_of(op, x);
  for (const Argument& table : {Argument{op, "cos", cos}, Argument{op, "sin", sin}}) {
    table.has_shape({heads.tokens, heads.dim / 2});
    table.has_dtype(ScalarType::Float);
  }
  const Tensor cosines = dense(cos), sines = dense(sin), y = empty_dense(x);
  with_type({op, "x", x}, [&](auto type) {
    auto params = heads.params<decltype(type)>(y, inverse);
    params.cos = read<float>(cosines);
    params.sin = read<float>(sines);
    for_items(heads.tokens, heads.heads * heads.dim,
              [&](int64_t begin, int64_t end) { cpu::rotate(params, begin, end); });
  });
  return y;
}

Tensor rope_2d(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return run_rope_2d("rope_2d", x, cos, sin, false);
}

Tensor rope_2d_backward(const Tensor& grad, const Tensor& cos, const Tensor& sin) {
  return run_rope_2d("rope_2d_backward", grad, cos, sin, true);
}

Tensor run_mrope(const char* op, const Tensor& x, const Tensor& positions,
                 const std::vector<int64_t>& sections, double theta, bool inverse) {
  const Heads heads = heads_of(op, x);
  const Sections table = sections_of(op, positions, sections, theta, heads.tokens, heads.dim);
  const Tensor y = empty_dense(x);
  with_type({op, "x", x}, [&](auto type) {
    using T = decltype(type);
    const MropeParams<T> params{heads.params<T>(y, inverse), table.angles()};
    for_items(heads.tokens, (heads.heads + 8) * heads.dim,
              [&](int64_t begin, int64_t end) { cpu::mrope(params, begin, end); });
  });
  return y;
}

Tensor mrope(const Tensor& x, const Tensor& positions, const std::vector<int64_t>& sections, double theta) {
  return run_mrope("mrope", x, positions, sections, theta, false);
}

Tensor mrope_backward(const Tensor& grad, const Tensor& positions, const std::vector<int64_t>& sections,
                      double theta) {
  return run_mrope("mrope_backward", grad, positions, sections, theta, true);
}

std::tuple<Tensor, Tensor> qk_norm_mrope(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                                         const Tensor& positions, const std::vector<int64_t>& sections,
                                         double theta, double eps, int64_t num_kv_heads) {
  const char* op = "qk_norm_mrope";
  const Projection projection = projection_of(op, qkv, q_weight, k_weight, num_kv_heads);
  const auto [rows, query, key, num_q_heads, kv_heads, dim] = projection;
  const Sections table = sections_of(op, positions, sections, theta, qkv.size(0), dim);
  const Tensor q = empty(qkv, {qkv.size(0), num_q_heads, dim}), k = empty(qkv, {qkv.size(0), kv_heads, dim});
  with_type({op, "qkv", qkv}, [&](auto type) {
    using T = decltype(type);
    auto params = norm_mrope_params<T>(projection, table, eps);
    params.q = write<T>(q);
    params.k = write<T>(k);
    for_items(params.angles.tokens, 2 * params.stride,
              [&](int64_t begin, int64_t end) { cpu::qk_norm_mrope(params, begin, end); });
  });
  return {q, k};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_mrope_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                          const Tensor& qkv, const Tensor& q_weight,
                                                          const Tensor& k_weight, const Tensor& positions,
                                                          const std::vector<int64_t>& sections, double theta,
                                                          double eps, int64_t num_kv_heads) {
  const char* op = "qk_norm_mrope_backward";
  const Projection projection = projection_of(op, qkv, q_weight, k_weight, num_kv_heads);
  const int64_t tokens = qkv.size(0), dim = projection.dim;
  const Sections table = sections_of(op, positions, sections, theta, tokens, dim);
  const Argument upstream_q{op, "grad_q", grad_q}, upstream_k{op, "grad_k", grad_k};
  upstream_q.has_shape({tokens, projection.num_q_heads, dim});
  upstream_k.has_shape({tokens, num_kv_heads, dim});
  upstream_q.has_dtype(qkv.scalar_type());
  upstream_k.has_dtype(qkv.scalar_type());
  const Tensor dense_q = dense(grad_q), dense_k = dense(grad_k), grad_qkv = empty_dense(qkv);
  Tensor grad_weights = empty(qkv, {2, dim});
  const Tensor partial = empty(qkv, {tokens, 2, dim}, ScalarType::Float);
  with_type({op, "qkv", qkv}, [&](auto type) {
    using T = decltype(type);
    const auto forward = norm_mrope_params<T>(projection, table, eps);
    const QkNormMropeBackwardParams<T> params{read<T>(dense_q),
                                              read<T>(dense_k),
                                              forward.qkv,
                                              forward.q_weight,
                                              forward.k_weight,
                                              write<T>(grad_qkv),
                                              write<T>(grad_weights),
                                              write<float>(partial),
                                              forward.angles,
                                              forward.num_q_heads,
                                              forward.num_kv_heads,
                                              dim,
                                              forward.stride,
                                              forward.eps};
    for_items(tokens, 4 * forward.stride,
              [&](int64_t begin, int64_t end) { cpu::qk_norm_mrope_backward(params, begin, end); });
    for_items(blocks_of(2 * dim, kColumnBlock), tokens * kColumnBlock,
              [&](int64_t begin, int64_t end) { cpu::qk_norm_mrope_backward_columns(params, begin, end); });
  });
  // Two owned tensors, not two views of one.
  Tensor grad_q_weight = empty(qkv, {dim}), grad_k_weight = empty(qkv, {dim});
  torch::stable::copy_(grad_q_weight, torch::stable::select(grad_weights, 0, 0));
  torch::stable::copy_(grad_k_weight, torch::stable::select(grad_weights, 0, 1));
  return {grad_qkv, grad_q_weight, grad_k_weight};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("rope_2d", TORCH_BOX(&rope_2d));
  m.impl("rope_2d_backward", TORCH_BOX(&rope_2d_backward));
  m.impl("mrope", TORCH_BOX(&mrope));
  m.impl("mrope_backward", TORCH_BOX(&mrope_backward));
  m.impl("qk_norm_mrope", TORCH_BOX(&qk_norm_mrope));
  m.impl("qk_norm_mrope_backward", TORCH_BOX(&qk_norm_mrope_backward));
}

} // namespace kvkeye
