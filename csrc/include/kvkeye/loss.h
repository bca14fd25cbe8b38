// Log-probabilities. Items are rows.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// out = log softmax(logits)[target]; with a grad, grad_logits = grad (onehot(target) - softmax(logits)).
template <class T> struct TokenLogprobsParams {
  const T* logits;        // [rows, vocabulary], rows stride apart
  const int64_t* targets; // [rows], in [0, vocabulary)
  float* out;             // [rows], or null
  const float* grad;      // [rows], or null
  T* grad_logits;         // [rows, vocabulary], or null
  int64_t vocabulary, stride;
};

KVKEYE_KERNEL(token_logprobs, TokenLogprobsParams)
KVKEYE_KERNEL(token_logprobs_backward, TokenLogprobsParams)

} // namespace kvkeye
