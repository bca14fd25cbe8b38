// Linear layers: tensors to Params to kernels.
#include "kvkeye/linear.h"
#include "layers.h"
#include "linear_cut.h"

#include <algorithm>
#include <optional>

namespace kvkeye {
namespace {

// A weight as it came, or packed: [blocks, parts, words, kPanel, values per word].
struct Weight {
  Tensor tensor;
  bool packed;
  int64_t outputs, inputs, stride, parts;
};

// How many values of a dtype make a word of a packed weight.
int64_t per_word(ScalarType dtype) {
  return dtype == ScalarType::Float ? 1 : 2;
}

Weight plain_weight(const char* op, const Tensor& x, const Tensor& weight) {
  const Argument argument{op, "weight", weight};
  argument.has_dim(2, "[O, K]");
  argument.has_dtype(x.scalar_type());
  const Rows rows = as_rows(argument);
  require(x.dim() >= 1 && x.size(-1) == rows.dim, op, ": x has shape ", shape_text(x), "; expected [..., ",
          rows.dim, "].");
  return {rows.tensor, false, weight.size(0), rows.dim, rows.stride, 1};
}

Weight packed_weight(const char* op, const Tensor& x, const Tensor& packed, int64_t outputs, int64_t parts) {
  const Argument argument{op, "packed", packed};
  argument.has_dim(5, "[blocks, parts, words, 32, values per word]");
  argument.has_dtype(x.scalar_type());
  require(x.dim() >= 1, op, ": x is a scalar; expected [..., K].");
  const int64_t values = per_word(x.scalar_type()), inputs = x.size(-1);
  argument.has_shape({blocks_of(outputs, kPanel), parts, blocks_of(inputs, values), kPanel, values});
  return {dense(packed), true, outputs, inputs, 0, parts};
}

// What follows the product: an op of this family says which of them it has.
struct Ending {
  Epilogue epilogue = Epilogue::none;
  const std::optional<Tensor>* bias = nullptr;
  const Tensor* residual = nullptr;
};

Tensor run(const char* op, const Tensor& x, const Weight& weight, const Ending& ending) {
  const Argument x_argument{op, "x", x};
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = weight.outputs;
  const Tensor y = empty(x, shape);
  Tensor bias = weight.tensor;
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
    LinearParams<T> params{};
    params.x = read<T>(rows.tensor);
    params.weight = read<T>(weight.tensor);
    params.bias = has_bias ? read<T>(bias) : nullptr;
    params.residual = ending.residual != nullptr ? read<T>(residual.tensor) : nullptr;
    params.y = write<T>(y);
    params.rows = weight.outputs == 0 ? 0 : y.numel() / weight.outputs;
    params.inputs = weight.inputs;
    params.outputs = weight.outputs;
    params.x_stride = rows.stride;
    params.weight_stride = weight.stride;
    params.residual_stride = residual.stride;
    params.epilogue = ending.epilogue;
    params.packed = weight.packed;
    params.paired = fast_bf16_pairs();
    choose_cut(params);
    for_items(params.items(), cost_of_item(params),
              [&](int64_t begin, int64_t end) { cpu::linear(params, begin, end); });
  });
  return y;
}

} // namespace

Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return run("packed_linear", x, plain_weight("packed_linear", x, weight), {Epilogue::none, &bias, nullptr});
}

Tensor prepacked_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t outputs) {
  const char* op = "prepacked_linear";
  return run(op, x, packed_weight(op, x, packed, outputs, 1), {Epilogue::none, &bias, nullptr});
}

namespace {

Tensor prepacked_linear_gelu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                             int64_t outputs, bool tanh) {
  const char* op = "prepacked_linear_gelu";
  return run(op, x, packed_weight(op, x, packed, outputs, 1),
             {tanh ? Epilogue::gelu_tanh : Epilogue::gelu, &bias, nullptr});
}

} // namespace

Tensor prepacked_linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                            const Tensor& residual) {
  const char* op = "prepacked_linear_add";
  require(residual.dim() >= 1, op, ": residual is a scalar; expected [..., O].");
  return run(op, x, packed_weight(op, x, packed, residual.size(-1), 1), {Epilogue::add, &bias, &residual});
}

Tensor prepacked_linear_silu_mul(const Tensor& x, const Tensor& packed, int64_t outputs) {
  const char* op = "prepacked_linear_silu_mul";
  return run(op, x, packed_weight(op, x, packed, outputs, 2), {Epilogue::silu_mul, nullptr, nullptr});
}

namespace {

Tensor pack_weight(const Tensor& weight, int64_t parts, int64_t values) {
  const Argument argument{"pack_weight", "weight", weight};
  argument.has_dim(2, "[O, K]");
  const Rows rows = as_rows(argument);
  require((parts == 1 || parts == 2) && weight.size(0) % parts == 0, "pack_weight: weight has shape ",
          shape_text(weight), " and parts is ", parts, "; expected 1 or 2 that divides the outputs.");
  require(values == per_word(weight.scalar_type()), "pack_weight: values is ", values,
          "; the C++ kernels take words of four bytes.");
  const int64_t outputs = weight.size(0) / parts;
  const Tensor packed =
      empty(weight, {blocks_of(outputs, kPanel), parts, blocks_of(rows.dim, values), kPanel, values});
  with_type(argument, [&](auto type) {
    using T = decltype(type);
    const PackWeightParams<T> params{
        read<T>(rows.tensor), write<T>(packed), rows.dim, outputs, rows.stride, parts};
    for_items(params.items(), kPanel * (rows.dim + 1),
              [&](int64_t begin, int64_t end) { cpu::pack_weight(params, begin, end); });
  });
  return packed;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("prepacked_linear", TORCH_BOX(&prepacked_linear));
  m.impl("prepacked_linear_gelu", TORCH_BOX(&prepacked_linear_gelu));
  m.impl("prepacked_linear_add", TORCH_BOX(&prepacked_linear_add));
  m.impl("prepacked_linear_silu_mul", TORCH_BOX(&prepacked_linear_silu_mul));
}

} // namespace kvkeye
