// Linear layers: tensors to Params to kernels.
#include "kvkeye/linear.h"
#include "checks.h"

#include <algorithm>
#include <optional>

namespace kvkeye {
namespace {

// About half of a second-level cache.
constexpr int64_t kBlockBytes = 512 * 1024;

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Argument x_argument{"packed_linear", "x", x}, weight_argument{"packed_linear", "weight", weight};
  weight_argument.has_dim(2, "[O, K]");
  weight_argument.has_dtype(x.scalar_type());
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  require(x.dim() >= 1 && x.size(-1) == inputs, "packed_linear: x has shape ", shape_text(x),
          "; expected [..., ", inputs, "].");
  Tensor offsets = weight;
  if (bias.has_value()) {
    const Argument argument{"packed_linear", "bias", *bias};
    argument.has_shape({outputs});
    argument.has_dtype(x.scalar_type());
    offsets = dense(*bias);
  }
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = outputs;
  const Tensor y = empty(x, shape);
  const Rows rows = as_rows(x_argument), weights = as_rows(weight_argument);
  with_type(x_argument, [&](auto type) {
    using T = decltype(type);
    const int64_t count = outputs == 0 ? 0 : y.numel() / outputs;
    const int64_t row_block = kBlockBytes / (int64_t)(sizeof(T) * std::max<int64_t>(inputs, 1)) / 12 * 12;
    const PackedLinearParams<T> params{read<T>(rows.tensor),
                                       read<T>(weights.tensor),
                                       bias.has_value() ? read<T>(offsets) : nullptr,
                                       write<T>(y),
                                       count,
                                       inputs,
                                       outputs,
                                       rows.stride,
                                       weights.stride,
                                       std::clamp<int64_t>(row_block, 12, 192)};
    const int64_t cost = params.output_block * inputs * std::min(count, params.row_block);
    for_items(params.items(), cost,
              [&](int64_t begin, int64_t end) { cpu::packed_linear(params, begin, end); });
  });
  return y;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

} // namespace kvkeye
