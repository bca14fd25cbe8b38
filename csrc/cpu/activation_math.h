// Activations of one vector: shared by the elementwise kernels and the epilogues of linear layers.
#pragma once

#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f;

KVKEYE_INLINE Vf clamp(Vf x, float bound) {
  return max(splat(-bound), min(splat(bound), x)); // in this order a NaN passes
}

// 2^(a b + shift) for |a b| <= 125: a b = n + r with |r| <= 1/2, of which r is rounded once, a polynomial of
// relative error 9.2e-8 (minimax, exact at 0), and n added to its exponent.
KVKEYE_INLINE Vf exp2_of_product(Vf a, Vf b, int shift = 0) {
  const float magic = 12582912.0f + (float)shift; // 1.5 * 2^23: adding it rounds to an integer
  const Vf shifted = fma(a, b, splat(magic));
  const Vf r = fma(a, b, magic - shifted);
  Vf p = splat(0.0013264727630315483f);
  p = fma(p, r, splat(0.009671512646240086f));
  p = fma(p, r, splat(0.055507337417517455f));
  p = fma(p, r, splat(0.2402224208525834f));
  p = fma(p, r, splat(0.6931469776002885f));
  p = fma(p, r, splat(1.0f));
  return (Vf)((Vu)p + ((Vu)shifted << 23));
}

// exp(-x). Beyond 86 it would overflow, or be subnormal; there a sigmoid is 0 or 1 to fp32 anyway.
KVKEYE_INLINE Vf exp_of_minus(Vf x) {
  return exp2_of_product(clamp(x, 86.0f), splat(-kLog2E));
}

constexpr float kRootTwoOverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// exp(-2u) of u = sqrt(2 / pi) (x + kCubic x^3), the argument of tanh. Beyond 10 as above.
KVKEYE_INLINE Vf exp_of_minus_cubic(Vf x) {
  constexpr float kLinear = -2.0f * kLog2E * kRootTwoOverPi;
  const Vf near = clamp(x, 10.0f);
  return exp2_of_product(near, fma(near * near, splat(kLinear * kCubic), splat(kLinear)));
}

// |x|, at most what normal_tail takes. There the tail is 2^-125: larger arguments have the same to fp32.
KVKEYE_INLINE Vf magnitude_of(Vf x) {
  return min(splat(10.9f), (Vf)((Vu)x & 0x7fffffffu));
}

// Phi(-m), the tail of the normal distribution, for m up to 10.9: 2 to a polynomial, minimax up to 5.65
// (absolute error 7e-9, relative error 4.3e-6 before rounding), which from there falls ever faster.
KVKEYE_INLINE Vf normal_tail(Vf m) {
  Vf q = splat(-3.399297199280227e-08f);
  q = fma(q, m, splat(9.73216970123758e-07f));
  q = fma(q, m, splat(-1.1995682143606246e-05f));
  q = fma(q, m, splat(8.126412285491824e-05f));
  q = fma(q, m, splat(-0.00029211185756139457f));
  q = fma(q, m, splat(1.756625533744227e-05f));
  q = fma(q, m, splat(0.0069347042590379715f));
  q = fma(q, m, splat(-0.05243848264217377f));
  q = fma(q, m, splat(-0.459220290184021f));
  q = fma(q, m, splat(-1.1511043310165405f));
  return exp2_of_product(m, q, -1);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): nothing cancels. By tanh: (1 + tanh u) / 2 = sigmoid(2u), which
// loses nothing where tanh is close to -1.
KVKEYE_INLINE Vf gelu_value(Vf x, bool tanh) {
  if (tanh)
    return x / (1.0f + exp_of_minus_cubic(x));
  const Vf m = magnitude_of(x);
  return fma(-m, normal_tail(m), max(splat(0.0f), x));
}

// silu(gate) * up
KVKEYE_INLINE Vf silu_mul_value(Vf gate, Vf up) {
  return gate / (1.0f + exp_of_minus(gate)) * up;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
