// Activations. Items are blocks of kElementBlock columns, row by row.
#pragma once

#include "kvkeye/common/kernel.h"

namespace kvkeye {

// y = silu(gate) * up
template <class T> struct SiluMulParams {
  const T* gate_up; // [rows, 2 size], gate first, rows stride apart
  T* y;             // [rows, size]
  int64_t size, stride;
};

template <class T> struct SiluMulBackwardParams {
  const T* grad;    // [rows, size]
  const T* gate_up; // [rows, 2 size], rows stride apart
  T* grad_gate_up;  // [rows, 2 size]
  int64_t size, stride;
};

// y = x Phi(x), by erf or by the tanh approximation; with a grad, y = grad d(x Phi(x))/dx
template <class T> struct GeluParams {
  const T* x;    // [size]
  const T* grad; // [size], or null
  T* y;          // [size]
  int64_t size;
  bool tanh;
};

KVKEYE_KERNEL(silu_mul, SiluMulParams)
KVKEYE_KERNEL(silu_mul_backward, SiluMulBackwardParams)
KVKEYE_KERNEL(gelu, GeluParams)

} // namespace kvkeye
