// Activations of the feed-forward layers, forward and backward.
#include "kvkeye/activation.h"
#include "activation_math.h"
#include "kvkeye/common/simd_pairs.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Items count blocks of kElementBlock columns row by row: body(row, first column, end column).
template <class Body> KVKEYE_INLINE void for_blocks(int64_t begin, int64_t end, int64_t size, Body body) {
  const int64_t per_row = blocks_of(size, kElementBlock);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % per_row * kElementBlock;
    body(item / per_row, first, first + kElementBlock < size ? first + kElementBlock : size);
  }
}

// The derivative of x Phi(x). Beyond 30 it is 0 or 1 to fp32 and the powers of x would overflow.
KVKEYE_INLINE Vf gelu_slope(Vf x, bool tanh) {
  const Vf near = clamp(x, 30.0f), square = near * near;
  if (tanh) {
    const Vf minus = exp_of_minus_cubic(near), gate = 1.0f / (1.0f + minus);
    const Vf inner = 2.0f * kRootTwoOverPi * (1.0f + 3.0f * kCubic * square);
    return gate + near * gate * (minus * gate) * inner;
  }
  const Vf tail = normal_tail(magnitude_of(near)), density = 0.3989422804014327f * exp(-0.5f * square);
  return (near < 0.0f ? tail : 1.0f - tail) + near * density;
}

template <bool kTanh, class T>
KVKEYE_INLINE void gelu_block(const GeluParams<T>& p, int64_t first, int64_t last) {
  if (p.grad == nullptr)
    map_vectors(first, last, p.y, [](Vf x) KVKEYE_LAMBDA { return gelu_value(x, kTanh); }, p.x);
  else
    map_vectors(
        first, last, p.y, [](Vf grad, Vf x) KVKEYE_LAMBDA { return grad * gelu_slope(x, kTanh); }, p.grad,
        p.x);
}

} // namespace

template <class T> void silu_mul(const SiluMulParams<T>& p, int64_t begin, int64_t end) {
  for_blocks(begin, end, p.size, [&](int64_t row, int64_t first, int64_t last) KVKEYE_LAMBDA {
    const T* gate = p.gate_up + row * p.stride;
    const T* up = gate + p.size;
    T* y = p.y + row * p.size;
    map_vectors(first, last, y, [](Vf g, Vf u) KVKEYE_LAMBDA { return silu_mul_value(g, u); }, gate, up);
  });
}

template <class T> void silu_mul_backward(const SiluMulBackwardParams<T>& p, int64_t begin, int64_t end) {
  for_blocks(begin, end, p.size, [&](int64_t row, int64_t first, int64_t last) KVKEYE_LAMBDA {
    const T* gate = p.gate_up + row * p.stride;
    const T* up = gate + p.size;
    const T* grad = p.grad + row * p.size;
    T* grad_gate = p.grad_gate_up + row * 2 * p.size;
    T* grad_up = grad_gate + p.size;
    for_vectors(first, last, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf g = load(gate + i, lanes), upstream = load(grad + i, lanes);
      const Vf minus = exp_of_minus(g);
      const Vf sigmoid = 1.0f / (1.0f + minus);
      const Vf slope = sigmoid * (1.0f + g * (minus * sigmoid));
      store(grad_gate + i, upstream * load(up + i, lanes) * slope, lanes);
      store(grad_up + i, upstream * (g * sigmoid), lanes);
    });
  });
}

template <class T> void gelu(const GeluParams<T>& p, int64_t begin, int64_t end) {
  for_blocks(begin, end, p.size, [&](int64_t, int64_t first, int64_t last) KVKEYE_LAMBDA {
    if (p.tanh)
      gelu_block<true>(p, first, last);
    else
      gelu_block<false>(p, first, last);
  });
}

KVKEYE_INSTANTIATE(silu_mul, SiluMulParams)
KVKEYE_INSTANTIATE(silu_mul_backward, SiluMulBackwardParams)
KVKEYE_INSTANTIATE(gelu, GeluParams)

} // namespace kvkeye::KVKEYE_ISA
