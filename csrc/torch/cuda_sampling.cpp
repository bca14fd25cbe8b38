// Drawing the next token on the GPU: tensors to Params to the launcher. Reads no tensor value on the host.
#include "cuda_launch.h"
#include "kvkeye/sampling_cuda.h"

#include <optional>

namespace kvkeye {
namespace {

constexpr const char* kOp = "sample";

// A per-row setting of the right shape and type, contiguous.
Tensor setting(const char* name, const Tensor& tensor, int64_t size, ScalarType dtype) {
  const Argument argument{kOp, name, tensor};
  argument.has_shape({size});
  argument.has_dtype(dtype);
  return dense(tensor);
}

Tensor allowed(const Tensor& mask, int64_t rows, int64_t vocabulary) {
  const Argument argument{kOp, "mask", mask};
  argument.has_shape({rows, (vocabulary + 31) / 32});
  argument.has_dtype(ScalarType::Int);
  return dense(mask);
}

Tensor sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
              const Tensor& min_p, const Tensor& repetition, const Tensor& presence, const Tensor& frequency,
              const Tensor& history, const Tensor& cu_history, const Tensor& num_prompt, const Tensor& seeds,
              const Tensor& positions, const Tensor& sample_index, const std::optional<Tensor>& mask) {
  const Argument logits_argument{kOp, "logits", logits};
  logits_argument.has_dim(2, "[B, V]");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  require(vocabulary > 0 && vocabulary <= kCudaMostTokens, kOp, ": logits has shape ", shape_text(logits),
          "; the GPU kernel takes from 1 to ", kCudaMostTokens, " columns.");
  const Launch launch(logits);
  const Rows table = as_rows(logits_argument);
  const Tensor t = setting("temperature", temperature, rows, ScalarType::Float);
  const Tensor k = setting("top_k", top_k, rows, ScalarType::Int);
  const Tensor share = setting("top_p", top_p, rows, ScalarType::Float);
  const Tensor floor = setting("min_p", min_p, rows, ScalarType::Float);
  const Tensor repeated = setting("repetition", repetition, rows, ScalarType::Float);
  const Tensor present = setting("presence", presence, rows, ScalarType::Float);
  const Tensor frequent = setting("frequency", frequency, rows, ScalarType::Float);
  const Tensor past = setting("history", history, history.numel(), ScalarType::Int);
  const Tensor bounds = setting("cu_history", cu_history, rows + 1, ScalarType::Int);
  const Tensor prompt = setting("num_prompt", num_prompt, rows, ScalarType::Int);
  const Tensor seed = setting("seeds", seeds, rows, ScalarType::Long);
  const Tensor position = setting("positions", positions, rows, ScalarType::Long);
  const Tensor index = setting("sample_index", sample_index, rows, ScalarType::Long);
  const Tensor bits = mask.has_value() ? allowed(*mask, rows, vocabulary) : past;
  const Tensor tokens = empty(seed, {rows});
  with_type(logits_argument, [&](auto type) {
    using T = decltype(type);
    SampleCudaParams<T> params{};
    params.logits = read<T>(table.tensor);
    params.temperature = read<float>(t);
    params.top_p = read<float>(share);
    params.min_p = read<float>(floor);
    params.top_k = read<int32_t>(k);
    params.repetition = read<float>(repeated);
    params.presence = read<float>(present);
    params.frequency = read<float>(frequent);
    params.history = read<int32_t>(past);
    params.cu_history = read<int32_t>(bounds);
    params.num_prompt = read<int32_t>(prompt);
    params.seeds = read<int64_t>(seed);
    params.positions = read<int64_t>(position);
    params.sample_index = read<int64_t>(index);
    params.mask = mask.has_value() ? read<int32_t>(bits) : nullptr;
    params.tokens = write<int64_t>(tokens);
    params.rows = rows;
    params.logits_stride = table.stride;
    params.history_size = past.numel();
    params.vocabulary = (int32_t)vocabulary;
    check_launch(kOp, cuda::sample(params, launch.stream));
  });
  return tokens;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("sample", TORCH_BOX(&sample));
}

} // namespace kvkeye
