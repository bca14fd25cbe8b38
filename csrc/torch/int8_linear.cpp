// Linear layers of int8 weights: tensors to Params to kernels.
#include "kvkeye/int8_linear.h"
#include "layers.h"
#include "linear_cut.h"

#include <optional>

namespace kvkeye {
namespace {

void require_few_inputs(const char* op, int64_t inputs) {
  require(inputs >= 1 && inputs <= kMaxInputs, op, ": K is ", inputs, "; expected 1 to ", kMaxInputs,
          ", so that sums of products fit into 32 bits.");
}

// [blocks, parts, words, kPanel, 4] levels and [parts, outputs] scales.
struct Weight {
  Tensor packed, scales;
  int64_t outputs, inputs, parts;
};

Weight checked_weight(const char* op, const Tensor& x, const Tensor& packed, const Tensor& scales,
                      int64_t parts) {
  const Argument levels{op, "packed", packed}, factors{op, "scales", scales};
  factors.has_dim(2, "[parts, O]");
  factors.has_dtype(ScalarType::Float);
  levels.has_dtype(ScalarType::Byte);
  require(x.dim() >= 1, op, ": x is a scalar; expected [..., K].");
  const int64_t outputs = scales.size(1), inputs = x.size(-1);
  require_few_inputs(op, inputs);
  factors.has_shape({parts, outputs});
  levels.has_shape({blocks_of(outputs, kPanel), parts, blocks_of(inputs, 4), kPanel, 4});
  return {dense(packed), dense(scales), outputs, inputs, parts};
}

struct Ending {
  Epilogue epilogue = Epilogue::none;
  const std::optional<Tensor>* bias = nullptr;
  const Tensor* residual = nullptr;
};

// Records of x and the bytes from one to the next.
template <class T> Tensor quantized(const Rows& rows, int64_t count, QuantizeRowsParams<T>& params) {
  constexpr int64_t line = 64;
  params.x = read<T>(rows.tensor);
  params.inputs = rows.dim;
  params.x_stride = rows.stride;
  params.record_levels = blocks_of(rows.dim, line) * line;
  const Tensor records = empty(rows.tensor, {count, params.record_bytes()}, ScalarType::Char);
  params.records = write<int8_t>(records);
  for_items(count, rows.dim, [&](int64_t begin, int64_t end) { cpu::quantize_rows(params, begin, end); });
  return records;
}

Tensor run(const char* op, const Tensor& x, const Weight& weight, const Ending& ending) {
  const Argument x_argument{op, "x", x};
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = weight.outputs;
  const Tensor y = empty(x, shape);
  Tensor bias = weight.scales;
  const bool has_bias = ending.bias != nullptr && ending.bias->has_value();
  if (has_bias) {
    const Argument argument{op, "bias", **ending.bias};
    argument.has_shape({weight.outputs});
    argument.has_dtype(x.scalar_type());
    bias = dense(**ending.bias);
  }
  const Rows rows = as_rows(x_argument);
  Rows residual = rows;
  if (ending.residual != nullptr) {
    const Argument argument{op, "residual", *ending.residual};
    argument.has_shape_of("the result", y);
    argument.has_dtype(x.scalar_type());
    residual = as_rows(argument);
  }
  with_type(x_argument, [&](auto type) {
    using T = decltype(type);
    QuantizeRowsParams<T> quantization{};
    const Tensor records = quantized(rows, rows.count, quantization);
    Int8LinearParams<T> params{};
    params.x = read<int8_t>(records);
    params.weight = read<int8_t>(weight.packed);
    params.scales = read<float>(weight.scales);
    params.bias = has_bias ? read<T>(bias) : nullptr;
    params.residual = ending.residual != nullptr ? read<T>(residual.tensor) : nullptr;
    params.y = write<T>(y);
    params.rows = weight.outputs == 0 ? 0 : rows.count;
    params.inputs = weight.inputs;
    params.outputs = weight.outputs;
    params.x_stride = quantization.record_bytes();
    params.record_levels = quantization.record_levels;
    params.residual_stride = residual.stride;
    params.epilogue = ending.epilogue;
    choose_cut(params);
    for_items(params.items(), cost_of_item(params),
              [&](int64_t begin, int64_t end) { cpu::int8_linear(params, begin, end); });
  });
  return y;
}

} // namespace

Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scales,
                   const std::optional<Tensor>& bias) {
  const char* op = "int8_linear";
  return run(op, x, checked_weight(op, x, packed, scales, 1), {Epilogue::none, &bias, nullptr});
}

namespace {

Tensor int8_linear_add(const Tensor& x, const Tensor& packed, const Tensor& scales,
                       const std::optional<Tensor>& bias, const Tensor& residual) {
  const char* op = "int8_linear_add";
  return run(op, x, checked_weight(op, x, packed, scales, 1), {Epilogue::add, &bias, &residual});
}

} // namespace

Tensor int8_linear_silu_mul(const Tensor& x, const Tensor& packed, const Tensor& scales) {
  const char* op = "int8_linear_silu_mul";
  return run(op, x, checked_weight(op, x, packed, scales, 2), {Epilogue::silu_mul, nullptr, nullptr});
}

namespace {

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, int64_t parts) {
  const Argument argument{"quantize_weight", "weight", weight};
  argument.has_dim(2, "[O, K]");
  const Rows rows = as_rows(argument);
  require((parts == 1 || parts == 2) && weight.size(0) % parts == 0, "quantize_weight: weight has shape ",
          shape_text(weight), " and parts is ", parts, "; expected 1 or 2 that divides the outputs.");
  require_few_inputs("quantize_weight", rows.dim);
  const int64_t outputs = weight.size(0) / parts;
  const Tensor packed =
      empty(weight, {blocks_of(outputs, kPanel), parts, blocks_of(rows.dim, 4), kPanel, 4}, ScalarType::Byte);
  const Tensor scales = empty(weight, {parts, outputs}, ScalarType::Float);
  with_type(argument, [&](auto type) {
    using T = decltype(type);
    const QuantizeWeightParams<T> params{read<T>(rows.tensor),
                                         write<uint8_t>(packed),
                                         write<float>(scales),
                                         rows.dim,
                                         outputs,
                                         rows.stride,
                                         parts};
    for_items(params.items(), kPanel * rows.dim,
              [&](int64_t begin, int64_t end) { cpu::quantize_weight(params, begin, end); });
  });
  return {packed, scales};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("int8_linear", TORCH_BOX(&int8_linear));
  m.impl("int8_linear_add", TORCH_BOX(&int8_linear_add));
  m.impl("int8_linear_silu_mul", TORCH_BOX(&int8_linear_silu_mul));
}

} // namespace kvkeye
