// Merging of partial attention results, forward and backward.
#include "kvkeye/attention_merge.h"
#include "kvkeye/common/simd.h"

#include <cmath>

namespace kvkeye::KVKEYE_ISA {
namespace {

struct Shares {
  float a, b, lse;
};

// The shares of the two sets in the softmax denominator, both 0 if both sets are empty.
KVKEYE_INLINE Shares shares_of(float lse_a, float lse_b) {
  const float peak = lse_a > lse_b ? lse_a : lse_b;
  if (peak == -INFINITY)
    return {0.0f, 0.0f, -INFINITY};
  const float a = std::exp(lse_a - peak), b = std::exp(lse_b - peak);
  return {a / (a + b), b / (a + b), std::log(a + b) + peak};
}

} // namespace

template <class T> void merge_attention_states(const MergeStatesParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Shares share = shares_of(p.lse_a[row], p.lse_b[row]);
    p.lse[row] = share.lse;
    const T *o_a = p.o_a + row * p.dim, *o_b = p.o_b + row * p.dim;
    for_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      store(p.o + row * p.dim + i, share.a * load(o_a + i, lanes) + share.b * load(o_b + i, lanes), lanes);
    });
  }
}

// With shares a + b = 1: d o / d lse_a = a b (o_a - o_b), d lse / d lse_a = a.
template <class T>
void merge_attention_states_backward(const MergeStatesBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Shares share = shares_of(p.lse_a[row], p.lse_b[row]);
    const int64_t start = row * p.dim;
    const float along = sum_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf apart = load(p.o_a + start + i, lanes) - load(p.o_b + start + i, lanes);
      return load(p.grad_o + start + i, lanes) * apart;
    });
    for_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf grad = load(p.grad_o + start + i, lanes);
      store(p.grad_o_a + start + i, grad * share.a, lanes);
      store(p.grad_o_b + start + i, grad * share.b, lanes);
    });
    p.grad_lse_a[row] = share.a * (p.grad_lse[row] + share.b * along);
    p.grad_lse_b[row] = share.b * (p.grad_lse[row] - share.a * along);
  }
}

KVKEYE_INSTANTIATE(merge_attention_states, MergeStatesParams)
KVKEYE_INSTANTIATE(merge_attention_states_backward, MergeStatesBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
