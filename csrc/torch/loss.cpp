// Log-probabilities: tensors to Params to kernels.
#include "kvkeye/loss.h"
#include "checks.h"

namespace kvkeye {
namespace {

struct Batch {
  Rows logits;
  Tensor targets; // dense
};

Batch batch_of(const char* op, const Tensor& logits, const Tensor& targets) {
  const Argument argument{op, "logits", logits};
  argument.has_dim(2, "[T, V]");
  const Argument target_argument{op, "targets", targets};
  target_argument.has_shape({logits.size(0)});
  target_argument.has_dtype(ScalarType::Long);
  const Batch batch{as_rows(argument), dense(targets)};
  const int64_t* target = read<int64_t>(batch.targets);
  for (int64_t i = 0; i < logits.size(0); ++i)
    require(target[i] >= 0 && target[i] < logits.size(1), op, ": targets[", i, "] is ", target[i],
            "; logits has ", logits.size(1), " columns.");
  return batch;
}

template <class T> TokenLogprobsParams<T> params_of(const Batch& batch) {
  TokenLogprobsParams<T> params{};
  params.logits = read<T>(batch.logits.tensor);
  params.targets = read<int64_t>(batch.targets);
  params.vocabulary = batch.logits.dim;
  params.stride = batch.logits.stride;
  return params;
}

Tensor token_logprobs(const Tensor& logits, const Tensor& targets) {
  const char* op = "token_logprobs";
  const Batch batch = batch_of(op, logits, targets);
  const Tensor out = empty(logits, {logits.size(0)}, ScalarType::Float);
  with_type({op, "logits", logits}, [&](auto type) {
    auto params = params_of<decltype(type)>(batch);
    params.out = write<float>(out);
    for_items(logits.size(0), 4 * params.vocabulary,
              [&](int64_t begin, int64_t end) { cpu::token_logprobs(params, begin, end); });
  });
  return out;
}

Tensor token_logprobs_backward(const Tensor& grad, const Tensor& logits, const Tensor& targets) {
  const char* op = "token_logprobs_backward";
  const Batch batch = batch_of(op, logits, targets);
  const Argument argument{op, "grad", grad};
  argument.has_shape({logits.size(0)});
  argument.has_dtype(ScalarType::Float);
  const Tensor upstream = dense(grad), out = empty_dense(logits);
  with_type({op, "logits", logits}, [&](auto type) {
    using T = decltype(type);
    auto params = params_of<T>(batch);
    params.grad = read<float>(upstream);
    params.grad_logits = write<T>(out);
    for_items(logits.size(0), 8 * params.vocabulary,
              [&](int64_t begin, int64_t end) { cpu::token_logprobs_backward(params, begin, end); });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

} // namespace kvkeye
