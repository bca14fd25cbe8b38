// Checking proposed tokens against the model: tensors to Params to kernels.
#include "kvkeye/speculative.h"
#include "sampling.h"
#include "speculative.h"

namespace kvkeye {
namespace {

constexpr const char* kOp = "verify_draft";

void check_tree(const int32_t* parents, const int64_t* tokens, int64_t first, int64_t size, int64_t b,
                int64_t vocabulary) {
  require(size <= kTreeRows, kOp, ": tree ", b, " has ", size, " rows; at most ", kTreeRows, " are allowed.");
  require(size == 0 || parents[first] == -1, kOp, ": tree_parents[", first, "] = ", size ? parents[first] : 0,
          "; expected -1, the root of tree ", b, ".");
  for (int64_t row = 1; row < size; ++row) {
    require(0 <= parents[first + row] && parents[first + row] < row, kOp, ": tree_parents[", first + row,
            "] = ", parents[first + row], "; expected an earlier row of tree ", b, ", 0 to ", row - 1, ".");
    require(0 <= tokens[first + row] && tokens[first + row] < vocabulary, kOp, ": draft_tokens[", first + row,
            "] = ", tokens[first + row], "; expected a token id from 0 to ", vocabulary - 1, ".");
  }
}

void check_trees(const Tensor& draft_tokens, const Tensor& tree_parents, const Tensor& cu_rows, int64_t rows,
                 int64_t vocabulary) {
  const int32_t* bounds = read<int32_t>(cu_rows);
  const int64_t trees = cu_rows.size(0) - 1;
  require(bounds[0] == 0 && bounds[trees] == rows, kOp, ": cu_rows runs from ", bounds[0], " to ",
          bounds[trees], "; expected 0 to ", rows, ".");
  for (int64_t b = 0; b < trees; ++b)
    require(bounds[b] <= bounds[b + 1], kOp, ": cu_rows[", b, "] = ", bounds[b], " and [", b + 1,
            "] = ", bounds[b + 1], "; expected ascending values.");
  for (int64_t b = 0; b < trees; ++b)
    check_tree(read<int32_t>(tree_parents), read<int64_t>(draft_tokens), bounds[b], bounds[b + 1] - bounds[b],
               b, vocabulary);
}

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
  require(vocabulary > 0, kOp, ": logits has shape ", shape_text(logits), "; expected at least one column.");
  const Rows table = as_rows(logits_argument);
  const Proposals proposed(kOp, draft_tokens, tree_parents, cu_rows, draft_probs, rows, vocabulary);
  const int64_t trees = proposed.trees;
  check_trees(proposed.tokens, proposed.parents, proposed.bounds, rows, vocabulary);
  const Settings settings(kOp, trees, temperature, top_k, top_p, min_p, repetition, presence, frequency,
                          history, cu_history, num_prompt, seeds, positions, sample_index);
  check_history(kOp, settings, vocabulary);
  const Tensor bits = mask.has_value() ? allowed(kOp, *mask, rows, vocabulary) : settings.history;
  const Tensor tokens = empty(proposed.tokens, {rows}), from = empty(proposed.tokens, {rows}),
               counts = empty(proposed.tokens, {trees});
  const int64_t longest = longest_history(settings) + kTreeRows;
  with_type(logits_argument, [&](auto type) {
    using T = decltype(type);
    VerifyDraftParams<T> params{};
    settings.fill(params.sample);
    params.sample.vocabulary = vocabulary;
    params.sample.mask = mask.has_value() ? read<int32_t>(bits) : nullptr;
    params.logits = read<T>(table.tensor);
    params.logits_stride = table.stride;
    proposed.fill(params);
    params.tokens = write<int64_t>(tokens);
    params.rows = write<int64_t>(from);
    params.counts = write<int64_t>(counts);
    for_items(trees, 32 * vocabulary, [&](int64_t begin, int64_t end) {
      const Workspace workspace(vocabulary, longest);
      const std::unique_ptr<int32_t[]> past(new int32_t[longest]);
      VerifyDraftParams<T> mine = params;
      workspace.lend(mine.sample);
      mine.history = past.get();
      cpu::verify_draft(mine, begin, end);
    });
  });
  return {tokens, from, counts};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("verify_draft", TORCH_BOX(&verify_draft));
}

} // namespace kvkeye
