// The softmax's running state and how two states of disjoint keys become one.
//
// Scores are in units of log2. Every product and sum is written as one rounding, never left to the compiler:
// a state that is folded in registers and one that went through memory give the same bits.
#pragma once

#include "ptx.h"

#include <math.h>

namespace kvkeye::cuda {

constexpr float kMinusInfinity = -INFINITY;
constexpr float kLn2 = 0.693147180559945309f, kLog2E = 1.44269504088896341f;

// Weights 2^(score - peak) were summed to total.
struct RowState {
  float peak, total;
};

// How much older and newer outputs weigh in the sum.
struct Weights {
  float keep, add;
};

// A peak of -inf must not meet itself: -inf + inf is NaN.
__device__ __forceinline__ float base_of(float peak) {
  return peak == kMinusInfinity ? 0.0f : peak;
}

// Adds the state of later keys. Exact where they were not seen.
__device__ __forceinline__ Weights join(RowState& sum, RowState more) {
  const float peak = fmaxf(sum.peak, more.peak), base = base_of(peak);
  const bool empty = more.total == 0.0f; // a NaN goes on
  const Weights weights{empty ? 1.0f : exp2_fast(sum.peak - base),
                        empty ? 0.0f : exp2_fast(more.peak - base)};
  sum.total = __fmaf_rn(weights.add, more.total, __fmul_rn(weights.keep, sum.total));
  sum.peak = empty ? sum.peak : peak;
  return weights;
}

__device__ __forceinline__ float joined(Weights weights, float sum, float more) {
  return __fmaf_rn(weights.add, more, __fmul_rn(weights.keep, sum));
}

__device__ __forceinline__ float inverse_of(float total) {
  return total == 0.0f ? 0.0f : 1.0f / total;
}

__device__ __forceinline__ float lse_of(RowState state) {
  return state.total == 0.0f ? kMinusInfinity : __fmaf_rn(state.peak, kLn2, logf(state.total));
}

} // namespace kvkeye::cuda
