// Drawing the next token: tensors to Params to kernels.
#include "sampling.h"

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
  require(vocabulary > 0, kOp, ": logits has shape ", shape_text(logits), "; expected at least one column.");
  const Rows table = as_rows(logits_argument);
  const Settings settings(kOp, rows, temperature, top_k, top_p, min_p, repetition, presence, frequency,
                          history, cu_history, num_prompt, seeds, positions, sample_index);
  check_history(kOp, settings, vocabulary);
  const Tensor bits = mask.has_value() ? allowed(kOp, *mask, rows, vocabulary) : settings.history;
  const Tensor tokens = empty(settings.seeds, {rows});
  const int64_t longest = longest_history(settings);
  with_type(logits_argument, [&](auto type) {
    using T = decltype(type);
    SampleParams<T> params{};
    settings.fill(params);
    params.vocabulary = vocabulary;
    params.logits = read<T>(table.tensor);
    params.mask = mask.has_value() ? read<int32_t>(bits) : nullptr;
    params.tokens = write<int64_t>(tokens);
    params.logits_stride = table.stride;
    for_items(rows, 16 * vocabulary, [&](int64_t begin, int64_t end) {
      const Workspace workspace(vocabulary, longest);
      SampleParams<T> mine = params;
      workspace.lend(mine);
      cpu::sample(mine, begin, end);
    });
  });
  return tokens;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("sample", TORCH_BOX(&sample));
}

} // namespace kvkeye
