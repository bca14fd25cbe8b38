// Probabilities in fp32 with a bound on their error: enough for most draws, and for knowing when it is not.
#pragma once

#include "sampling_mass.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// Of a probability or of the sum of four, relative. Counted in halves of an ulp: 1 for the rounding of the
// polynomial's last step, 1.6 for those before, 1 for its constant term, 1.4 for its remainder, 2 for the two
// additions; 8 are allowed.
constexpr double kFastError = 0x1p-21;
constexpr float kLeast =
    0x1p-64; // of probabilities that are told apart; all that is smaller comes out as less

// Logits to probabilities as Softmax has them: 2^(logit * log2(e) / temperature - O) * unit, where 2^O * unit
// stands for the likeliest token's and O is an integer.
struct FastSoftmax {
#if defined(__FMA__)
  float scale, rest; // log2(e) / temperature in two parts
  float lowest;      // logit; what lies below counts as this
  float shift;       // adding it to an exponent of 2 rounds to an integer and subtracts O
  float terms[6];    // of unit * 2^r for |r| <= 0.51: a polynomial of least relative error, 8.4e-8

  // Whether the error keeps within its bound.
  static bool fits(const Softmax& exact) {
    return exact.inverse > 0x1p-60 && exact.inverse < 0x1p60 && fabs(exact.offset) < 0x1p15;
  }

  explicit FastSoftmax(const Softmax& exact) {
    constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.69314718055994531;
    constexpr double kTerms[] = {1.0000000805346625,  0.6931469402420508,   0.2402207641444236,
                                 0.05550738138165546, 0.009677846068772613, 0.0013274170393405085};
    const double factor = exact.inverse * kLog2e, peak = exact.offset * kLog2e;
    const double whole = (peak + kRoundingMagic) - kRoundingMagic;
    const double unit = exp(splat_double((whole - peak) * kLn2))[0];
    scale = (float)factor;
    rest = (float)(factor - scale);
    lowest = (float)((whole - 100.0) / factor);
    shift = (float)(0x1.8p23 - whole);
    for (int i = 0; i < 6; ++i)
      terms[i] = (float)(unit * kTerms[i]);
  }

  KVKEYE_LAMBDA Vf of(Vf logit) const {
    const Vf x = max(logit, splat(lowest));
    const Vf shifted = fma(x, splat(scale), splat(shift));
    const Vf r = fma(x, splat(rest), fma(x, splat(scale), splat(shift) - shifted));
    Vf sum = splat(terms[5]);
    for (int i = 4; i >= 0; --i)
      sum = fma(sum, r, splat(terms[i]));
    return (Vf)((Vi)sum + ((Vi)shifted << 23));
  }
#else // without a fused product the exponent would lose digits
  Softmax exact;

  static bool fits(const Softmax&) { return true; }

  explicit FastSoftmax(const Softmax& exact_) : exact(exact_) {}

  KVKEYE_LAMBDA Vf of(Vf logit) const {
    Vd p[2];
    widen(logit, p);
    for (Vd& half : p)
      half = exact.of(half);
    return narrow(p);
  }
#endif
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
