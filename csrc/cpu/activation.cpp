// Activations of the feed-forward layers, forward and backward.
#include "kvkeye/activation.h"
#include "kvkeye/common/simd.h"

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

// Below -87 the exponential would overflow; there a sigmoid is 0 to fp32 anyway.
KVKEYE_INLINE Vf exp_of_minus(Vf x) {
  return exp(-max(x, splat(-87.0f)));
}

// erf(x), absolute error below 1e-7: x P(x^2) up to 1, 1 - exp(Q(|x|)) with Q = log erfc up to 4, then 1.
// Minimax polynomials, fitted in 40 digits: relative error 1.1e-9 and absolute error 2.1e-11 before rounding.
KVKEYE_INLINE Vf erf(Vf x) {
  const Vf magnitude = min(x < 0.0f ? -x : x, splat(4.0f));
  const Vf square = magnitude * magnitude;
  Vf p = splat(7.889122796700222e-05f);
  p = fma(p, square, splat(-0.0008020842257121974f));
  p = fma(p, square, splat(0.005189535448983548f));
  p = fma(p, square, splat(-0.0268544446485493f));
  p = fma(p, square, splat(0.1128360017757841f));
  p = fma(p, square, splat(-0.376126271360783f));
  p = fma(p, square, splat(1.1283791659137656f));
  Vf q = splat(-2.1686764198602492e-05f);
  q = fma(q, magnitude, splat(0.0004413353125877459f));
  q = fma(q, magnitude, splat(-0.004204556323301664f));
  q = fma(q, magnitude, splat(0.025208240972850744f));
  q = fma(q, magnitude, splat(-0.10841855098096063f));
  q = fma(q, magnitude, splat(-0.633219919026885f));
  q = fma(q, magnitude, splat(-1.1295784103352398f));
  q = fma(q, magnitude, splat(0.00018803707857702992f));
  const Vf result = magnitude < 1.0f ? p * magnitude : 1.0f - exp(q);
  return x < 0.0f ? -result : result;
}

constexpr float kRootTwoOverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// x Phi(x). By tanh: (1 + tanh u) / 2 = sigmoid(2u), which loses nothing where tanh is close to -1.
KVKEYE_INLINE Vf gelu_value(Vf x, bool tanh) {
  if (!tanh)
    return 0.5f * x * (1.0f + erf(x * 0.7071067811865476f));
  return x / (1.0f + exp_of_minus(2.0f * kRootTwoOverPi * (x + kCubic * x * x * x)));
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
      store(y + i, g / (1.0f + exp_of_minus(g)) * load(up + i, lanes), lanes);
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
