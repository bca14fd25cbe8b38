// Log-probabilities of chosen tokens, forward and backward.
#include "kvkeye/loss.h"
#include "kvkeye/common/simd.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

// The maximum of a row and the sum of e^(x - maximum): its softmax denominator.
struct Denominator {
  float peak, total;
};

template <class T> KVKEYE_INLINE float widened(const T* value) {
  float lane[kLanes];
  store(lane, load(value, 1));
  return lane[0];
}

template <class T> KVKEYE_INLINE Denominator denominator(const T* row, int64_t size) {
  Vf most = splat(-INFINITY);
  const int64_t whole = size / kLanes * kLanes;
  for_vectors(whole, [&](int64_t i, int) KVKEYE_LAMBDA { most = max(load(row + i), most); });
  float peak = largest(most);
  for (int64_t i = whole; i < size; ++i) {
    const float value = widened(row + i);
    peak = value > peak ? value : peak;
  }
  const float total = sum_vectors(size, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    return keep(exp_or_zero(load(row + i, lanes) - peak), lanes);
  });
  return {peak, total};
}

} // namespace

template <class T> void token_logprobs(const TokenLogprobsParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = p.logits + row * p.stride;
    const Denominator d = denominator(logits, p.vocabulary);
    p.out[row] = (widened(logits + p.targets[row]) - d.peak) - std::log(d.total);
  }
}

template <class T> void token_logprobs_backward(const TokenLogprobsParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = p.logits + row * p.stride;
    T* grad_logits = p.grad_logits + row * p.vocabulary;
    const Denominator d = denominator(logits, p.vocabulary);
    const int64_t target = p.targets[row];
    const float grad = p.grad[row];
    const auto softmax = [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      return exp_or_zero(load(logits + i, lanes) - d.peak) / d.total;
    };
    for_vectors(p.vocabulary, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      store(grad_logits + i, -grad * softmax(i, lanes), lanes);
    });
    store(grad_logits + target, grad * (1.0f - softmax(target, 1)), 1);
  }
}

KVKEYE_INSTANTIATE(token_logprobs, TokenLogprobsParams)
KVKEYE_INSTANTIATE(token_logprobs_backward, TokenLogprobsParams)

} // namespace kvkeye::KVKEYE_ISA
