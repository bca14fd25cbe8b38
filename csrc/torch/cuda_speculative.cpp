// Checking proposed tokens on the GPU: tensors to Params to the launcher. Reads no tensor value on the host.
#include "cuda_launch.h"
#include "kvkeye/speculative_cuda.h"
#include "speculative.h"

namespace kvkeye {
namespace {

constexpr const char* kOp = "verify_draft";

std::tuple<Tensor, Tensor, Tensor>
verify_draft(const Tensor& logits, const Tensor& draft_tokens, const Tensor& tree_parents,
             const Tensor& cu_rows, const std::optional<Tensor>& draft_probs, const Tensor& temperature,
             const Tensor& top_k, const Tensor& top_p, const Tensor& min_p, const Tensor& repetition,
             const Tensor& presence, const Tensor& frequency, const Tensor& history, const Tensor& cu_history,
             const Tensor& num_prompt, const Tensor& seeds, const Tensor& positions,
             const Tensor& sample_index, const std::optional<Tensor>& mask) {
  const Argument logits_argument{kOp, "logits", logits};
  logits_argument.has_dim(2, "[R, V]");
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  require(vocabulary > 0 && vocabulary <= kCudaMostTokens, kOp, ": logits has shape ", shape_text(logits),
          "; the GPU kernel takes from 1 to ", kCudaMostTokens, " columns.");
  const Proposals proposed(kOp, draft_tokens, tree_parents, cu_rows, draft_probs, rows, vocabulary);
  const int64_t trees = proposed.trees;
  require(trees > 0 || (trees == 0 && rows == 0), kOp, ": cu_rows has shape ", shape_text(cu_rows), " for ",
          rows, " rows of logits; expected [B + 1], the bounds of B trees.");
  const Launch launch(logits);
  const Rows table = as_rows(logits_argument);
  const Settings settings(kOp, trees, temperature, top_k, top_p, min_p, repetition, presence, frequency,
                          history, cu_history, num_prompt, seeds, positions, sample_index);
  const Tensor bits = mask.has_value() ? allowed(kOp, *mask, rows, vocabulary) : settings.history;
  const Tensor tokens = empty(proposed.tokens, {rows}), from = empty(proposed.tokens, {rows}),
               counts = empty(proposed.tokens, {trees});
  with_type(logits_argument, [&](auto type) {
    using T = decltype(type);
    VerifyDraftCudaParams<T> params{};
    settings.fill(params.sample);
    params.sample.logits = read<T>(table.tensor);
    params.sample.mask = mask.has_value() ? read<int32_t>(bits) : nullptr;
    params.sample.tokens = write<int64_t>(tokens);
    params.sample.rows = rows;
    params.sample.logits_stride = table.stride;
    params.sample.history_size = settings.history.numel();
    params.sample.vocabulary = (int32_t)vocabulary;
    proposed.fill(params);
    params.rows = write<int64_t>(from);
    params.counts = write<int64_t>(counts);
    params.trees = trees;
    check_launch(kOp, cuda::verify_draft(params, launch.stream));
  });
  return {tokens, from, counts};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("verify_draft", TORCH_BOX(&verify_draft));
}

} // namespace kvkeye
