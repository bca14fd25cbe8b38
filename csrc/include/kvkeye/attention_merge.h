// The attention over two disjoint sets of keys from the attention over each. Items are rows (token, head).
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// lse = log(e^lse_a + e^lse_b), o = e^(lse_a - lse) o_a + e^(lse_b - lse) o_b; two empty sets give o = 0, lse
// = -inf.
template <class T> struct MergeStatesParams {
  const T *o_a, *o_b;         // [rows, dim]
  const float *lse_a, *lse_b; // [rows]
  T* o;                       // [rows, dim]
  float* lse;                 // [rows]
  int64_t dim;
};

template <class T> struct MergeStatesBackwardParams {
  const T* grad_o;                // [rows, dim]
  const float* grad_lse;          // [rows]
  const T *o_a, *o_b;             // [rows, dim]
  const float *lse_a, *lse_b;     // [rows]
  T *grad_o_a, *grad_o_b;         // [rows, dim]
  float *grad_lse_a, *grad_lse_b; // [rows]
  int64_t dim;
};

KVKEYE_KERNEL(merge_attention_states, MergeStatesParams)
KVKEYE_KERNEL(merge_attention_states_backward, MergeStatesBackwardParams)

} // namespace kvkeye
