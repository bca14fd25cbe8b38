// The proposals of verify_draft, on any device: shapes and types are checked, no value is read.
#pragma once

#include "sampling_settings.h"

namespace kvkeye {

struct Proposals {
  int64_t trees;
  Tensor tokens, parents, bounds;
  std::optional<Tensor> shares; // draft_probs

  Proposals(const char* op, const Tensor& draft_tokens, const Tensor& tree_parents, const Tensor& cu_rows,
            const std::optional<Tensor>& draft_probs, int64_t rows, int64_t vocabulary) {
    const Argument bounds_argument{op, "cu_rows", cu_rows};
    bounds_argument.has_dim(1, "[B + 1]");
    trees = cu_rows.size(0) - 1;
    require(trees >= 0, op, ": cu_rows is empty; expected [B + 1].");
    tokens = setting(op, "draft_tokens", draft_tokens, rows, ScalarType::Long);
    parents = setting(op, "tree_parents", tree_parents, rows, ScalarType::Int);
    bounds = setting(op, "cu_rows", cu_rows, trees + 1, ScalarType::Int);
    if (draft_probs.has_value()) {
      const Argument shares_argument{op, "draft_probs", *draft_probs};
      shares_argument.has_shape({rows, vocabulary});
      shares_argument.has_dtype(ScalarType::Float);
      shares = dense(*draft_probs);
    }
  }

  template <class Params> void fill(Params& params) const {
    params.draft_tokens = read<int64_t>(tokens);
    params.tree_parents = read<int32_t>(parents);
    params.cu_rows = read<int32_t>(bounds);
    params.draft_probs = shares.has_value() ? read<float>(*shares) : nullptr;
  }
};

} // namespace kvkeye
