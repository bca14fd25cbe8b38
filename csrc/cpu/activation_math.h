// Activations of one vector: shared by the elementwise kernels and the epilogues of linear layers.
#pragma once

#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Beyond 87 the exponential would overflow, or be subnormal; there a sigmoid is 0 or 1 to fp32 anyway.
KVKEYE_INLINE Vf exp_of_minus(Vf x) {
  return exp_between(max(splat(-87.0f), min(splat(87.0f), -x)));
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

// Half of erfc(z) for z >= 0, absolute error below 4e-8 and relative error below 2e-5: exp of a minimax
// polynomial without a constant term for log erfc up to 4, then 0.
KVKEYE_INLINE Vf half_erfc(Vf z) {
  const Vf bounded = min(z, splat(4.0f));
  Vf q = splat(3.013218929481809e-06f);
  q = fma(q, bounded, splat(-5.122101720189676e-05f));
  q = fma(q, bounded, splat(0.000346603337675333f));
  q = fma(q, bounded, splat(-0.00102422630880028f));
  q = fma(q, bounded, splat(-0.0006472031818702817f));
  q = fma(q, bounded, splat(0.019720854237675667f));
  q = fma(q, bounded, splat(-0.10298912972211838f));
  q = fma(q, bounded, splat(-0.6365830898284912f));
  q = fma(q, bounded, splat(-1.1283812522888184f));
  return z < 4.0f ? 0.5f * exp_between(q * bounded) : Vf{};
}

// x Phi(x), Phi by the tail that is small: nothing cancels. By tanh: (1 + tanh u) / 2 = sigmoid(2u), which
// loses nothing where tanh is close to -1.
KVKEYE_INLINE Vf gelu_value(Vf x, bool tanh) {
  if (!tanh) {
    const Vf z = x * 0.7071067811865476f, tail = half_erfc(z < 0.0f ? -z : z);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  }
  return x / (1.0f + exp_of_minus(2.0f * kRootTwoOverPi * (x + kCubic * x * x * x)));
}

// silu(gate) * up
KVKEYE_INLINE Vf silu_mul_value(Vf gate, Vf up) {
  return gate / (1.0f + exp_of_minus(gate)) * up;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
