// Normalisations: tensors to Params to kernels.
#include "kvkeye/norm.h"
#include "checks.h"
#include "kvkeye/common/blocks.h"
#include "layers.h"

#include <optional>
#include <tuple>

namespace kvkeye {
namespace {

// A weight or bias of the last axis, dense.
Tensor per_column(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t dim) {
  const Argument argument{op, name, tensor};
  argument.has_shape({dim});
  argument.has_dtype(x.scalar_type());
  return dense(tensor);
}

Rows rows_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  const Argument argument{op, name, tensor};
  argument.has_shape_of("x", x);
  argument.has_dtype(x.scalar_type());
  return as_rows(argument);
}

struct Normed {
  Tensor y, total;
};

Normed run_rms_norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                    double eps) {
  const Rows rows = as_rows({op, "x", x});
  const Rows other = residual == nullptr ? rows : rows_like(op, "residual", *residual, x);
  const Tensor scale = per_column(op, "weight", weight, x, rows.dim);
  const Tensor y = empty_dense(x), total = residual == nullptr ? y : empty_dense(x);
  with_type({op, "x", x}, [&](auto type) {
    using T = decltype(type);
    RmsNormParams<T> params{};
    params.x = read<T>(rows.tensor);
    params.weight = read<T>(scale);
    params.y = write<T>(y);
    if (residual != nullptr) {
      params.residual = read<T>(other.tensor);
      params.total = write<T>(total);
    }
    params.dim = rows.dim;
    params.x_stride = rows.stride;
    params.residual_stride = other.stride;
    params.eps = (float)eps;
    for_items(rows.count, rows.dim, [&](int64_t begin, int64_t end) { cpu::rms_norm(params, begin, end); });
  });
  return {y, total};
}

} // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return run_rms_norm("rms_norm", x, nullptr, weight, eps).y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps) {
  const Normed normed = run_rms_norm("add_rms_norm", x, &residual, weight, eps);
  return {normed.y, normed.total};
}

namespace {

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const Rows rows = as_rows({"layer_norm", "x", x});
  const Tensor scale = per_column("layer_norm", "weight", weight, x, rows.dim);
  const Tensor shift = per_column("layer_norm", "bias", bias, x, rows.dim);
  const Tensor y = empty_dense(x);
  with_type({"layer_norm", "x", x}, [&](auto type) {
    using T = decltype(type);
    const LayerNormParams<T> params{
        read<T>(rows.tensor), read<T>(scale), read<T>(shift), write<T>(y), rows.dim, rows.stride, (float)eps};
    for_items(rows.count, rows.dim, [&](int64_t begin, int64_t end) { cpu::layer_norm(params, begin, end); });
  });
  return y;
}

// What the three backward ops share: which inputs there are decides what is computed.
struct Backward {
  const char* op;
  const Tensor &grad, &x, &weight;
  const Tensor* residual = nullptr;
  const Tensor* grad_total = nullptr;
  bool centred = false;
};

struct Gradients {
  Tensor x, residual, weight, bias;
};

Gradients run_backward(const Backward& b, double eps) {
  const Rows rows = as_rows({b.op, "x", b.x});
  const Tensor grad = dense(rows_like(b.op, "grad", b.grad, b.x).tensor);
  const Tensor scale = per_column(b.op, "weight", b.weight, b.x, rows.dim);
  const Rows other = b.residual == nullptr ? rows : rows_like(b.op, "residual", *b.residual, b.x);
  const Tensor grad_total =
      b.grad_total == nullptr ? grad : dense(rows_like(b.op, "grad_total", *b.grad_total, b.x).tensor);
  Gradients out{empty_dense(b.x), b.residual == nullptr ? grad : empty_dense(b.x), empty_dense(scale),
                b.centred ? empty_dense(scale) : scale};
  const Tensor statistics = empty(b.x, {2, rows.count}, ScalarType::Float);
  with_type({b.op, "x", b.x}, [&](auto type) {
    using T = decltype(type);
    NormBackwardParams<T> params{};
    params.grad = read<T>(grad);
    params.x = read<T>(rows.tensor);
    params.weight = read<T>(scale);
    params.grad_x = write<T>(out.x);
    params.grad_weight = write<T>(out.weight);
    params.scale = write<float>(statistics);
    if (b.grad_total != nullptr)
      params.grad_total = read<T>(grad_total);
    if (b.residual != nullptr) {
      params.residual = read<T>(other.tensor);
      params.grad_residual = write<T>(out.residual);
    }
    if (b.centred) {
      params.mean = params.scale + rows.count;
      params.grad_bias = write<T>(out.bias);
    }
    params.rows = rows.count;
    params.dim = rows.dim;
    params.x_stride = rows.stride;
    params.residual_stride = other.stride;
    params.eps = (float)eps;
    for_items(rows.count, 2 * rows.dim,
              [&](int64_t begin, int64_t end) { cpu::norm_backward_rows(params, begin, end); });
    for_items(blocks_of(rows.dim, kColumnBlock), rows.count * kColumnBlock,
              [&](int64_t begin, int64_t end) { cpu::norm_backward_columns(params, begin, end); });
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             double eps) {
  const Gradients out = run_backward({"rms_norm_backward", grad, x, weight}, eps);
  return {out.x, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_backward(const Tensor& grad, const Tensor& grad_total,
                                                         const Tensor& x, const Tensor& residual,
                                                         const Tensor& weight, double eps) {
  const Gradients out = run_backward({"add_rms_norm_backward", grad, x, weight, &residual, &grad_total}, eps);
  return {out.x, out.residual, out.weight};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& weight, const Tensor& bias, double eps) {
  per_column("layer_norm_backward", "bias", bias, x, x.size(-1));
  const Gradients out = run_backward({"layer_norm_backward", grad, x, weight, nullptr, nullptr, true}, eps);
  return {out.x, out.weight, out.bias};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

} // namespace kvkeye
