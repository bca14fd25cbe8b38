// Activations of the feed-forward layers, forward and backward.
#include "kvkeye/activation.h"
#include "activation_math.h"

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
  const Vf near = max(min(x, splat(30.0f)), splat(-30.0f));
  const Vf square = near * near;
  Vf slope;
  if (tanh) {
    const Vf minus = exp_of_minus(2.0f * kRootTwoOverPi * near * (1.0f + kCubic * square));
    const Vf gate = 1.0f / (1.0f + minus);
    const Vf inner = 2.0f * kRootTwoOverPi * (1.0f + 3.0f * kCubic * square);
    slope = gate + near * gate * (minus * gate) * inner;
  } else {
    const Vf density = 0.3989422804014327f * exp(-0.5f * square);
    slope = 0.5f * (1.0f + erf(near * 0.7071067811865476f)) + near * density;
  }
  return x == x ? slope : x;
}

} // namespace

template <class T> void silu_mul(const SiluMulParams<T>& p, int64_t begin, int64_t end) {
  for_blocks(begin, end, p.size, [&](int64_t row, int64_t first, int64_t last) KVKEYE_LAMBDA {
    const T* gate = p.gate_up + row * p.stride;
    const T* up = gate + p.size;
    T* y = p.y + row * p.size;
    for_vectors(first, last, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf g = load(gate + i, lanes);
      store(y + i, silu_mul_value(g, load(up + i, lanes)), lanes);
    });
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
    for_vectors(first, last, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf x = load(p.x + i, lanes);
      const Vf y =
          p.grad == nullptr ? gelu_value(x, p.tanh) : load(p.grad + i, lanes) * gelu_slope(x, p.tanh);
      store(p.y + i, y, lanes);
    });
  });
}

KVKEYE_INSTANTIATE(silu_mul, SiluMulParams)
KVKEYE_INSTANTIATE(silu_mul_backward, SiluMulBackwardParams)
KVKEYE_INSTANTIATE(gelu, GeluParams)

} // namespace kvkeye::KVKEYE_ISA
