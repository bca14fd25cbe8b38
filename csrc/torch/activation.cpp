// Activations: tensors to Params to kernels.
#include "kvkeye/activation.h"
#include "kvkeye/common/blocks.h"
#include "layers.h"

namespace kvkeye {
namespace {

Rows gate_up_rows(const char* op, const Tensor& gate_up) {
  const Rows rows = as_rows({op, "gate_up", gate_up});
  require(rows.dim % 2 == 0, op, ": gate_up has shape ", shape_text(gate_up),
          "; the last axis must hold gate then up, an even size.");
  return rows;
}

} // namespace

Tensor silu_mul(const Tensor& gate_up) {
  const Rows rows = gate_up_rows("silu_mul", gate_up);
  std::vector<int64_t> shape = shape_of(gate_up);
  const int64_t size = shape.back() /= 2;
  const Tensor y = empty(gate_up, shape);
  with_type({"silu_mul", "gate_up", gate_up}, [&](auto type) {
    using T = decltype(type);
    const SiluMulParams<T> params{read<T>(rows.tensor), write<T>(y), size, rows.stride};
    for_items(rows.count * blocks_of(size, kElementBlock), 4 * kElementBlock,
              [&](int64_t begin, int64_t end) { cpu::silu_mul(params, begin, end); });
  });
  return y;
}

namespace {

Tensor silu_mul_backward(const Tensor& grad, const Tensor& gate_up) {
  const Rows rows = gate_up_rows("silu_mul_backward", gate_up);
  const int64_t size = rows.dim / 2;
  const Argument grad_argument{"silu_mul_backward", "grad", grad};
  grad_argument.has_dtype(gate_up.scalar_type());
  require(grad.numel() == rows.count * size && grad.dim() == gate_up.dim() && grad.size(-1) == size,
          "silu_mul_backward: grad has shape ", shape_text(grad), "; gate_up ", shape_text(gate_up),
          " requires half of its last axis.");
  const Tensor upstream = dense(grad), out = empty_dense(gate_up);
  with_type({"silu_mul_backward", "gate_up", gate_up}, [&](auto type) {
    using T = decltype(type);
    const SiluMulBackwardParams<T> params{read<T>(upstream), read<T>(rows.tensor), write<T>(out), size,
                                          rows.stride};
    for_items(rows.count * blocks_of(size, kElementBlock), 8 * kElementBlock,
              [&](int64_t begin, int64_t end) { cpu::silu_mul_backward(params, begin, end); });
  });
  return out;
}

Tensor run_gelu(const char* op, const Tensor& x, const Tensor* grad, bool tanh) {
  const Tensor input = dense(x), upstream = grad == nullptr ? input : dense(*grad), y = empty_dense(x);
  with_type({op, "x", x}, [&](auto type) {
    using T = decltype(type);
    const GeluParams<T> params{read<T>(input), grad == nullptr ? nullptr : read<T>(upstream), write<T>(y),
                               x.numel(), tanh};
    for_items(blocks_of(x.numel(), kElementBlock), 4 * kElementBlock,
              [&](int64_t begin, int64_t end) { cpu::gelu(params, begin, end); });
  });
  return y;
}

Tensor gelu(const Tensor& x, bool tanh) {
  return run_gelu("gelu", x, nullptr, tanh);
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x, bool tanh) {
  const Argument argument{"gelu_backward", "grad", grad};
  argument.has_shape_of("x", x);
  argument.has_dtype(x.scalar_type());
  return run_gelu("gelu_backward", x, &grad, tanh);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward));
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

} // namespace kvkeye
