// Drawing the next token on the GPU: tensors to Params to the launcher. Reads no tensor value on the host.
#include "cuda_launch.h"
#include "kvkeye/sampling_cuda.h"
#include "sampling_settings.h"

namespace kvkeye {
namespace {

constexpr const char* kOp = "sample";

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
  const Settings settings(kOp, rows, temperature, top_k, top_p, min_p, repetition, presence, frequency,
                          history, cu_history, num_prompt, seeds, positions, sample_index);
  const Tensor bits = mask.has_value() ? allowed(kOp, *mask, rows, vocabulary) : settings.history;
  const Tensor tokens = empty(settings.seeds, {rows});
  with_type(logits_argument, [&](auto type) {
    using T = decltype(type);
    SampleCudaParams<T> params{};
    settings.fill(params);
    params.logits = read<T>(table.tensor);
    params.mask = mask.has_value() ? read<int32_t>(bits) : nullptr;
    params.tokens = write<int64_t>(tokens);
    params.rows = rows;
    params.logits_stride = table.stride;
    params.history_size = settings.history.numel();
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
