// Between which probabilities a share of the mass is reached.
#pragma once

#include "sampling_fast.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int64_t kExactBlocks = 512; // what exceeds all but so many blocks' maxima is counted exactly
constexpr int64_t kSampled = 12;      // of the rest, one block of so many stands for all of them

// Probabilities [low, high) in which the cut of top-p is looked for: those above stay, those below go.
struct Band {
  float low, high;
};

KVKEYE_INLINE void add(Vd (&sums)[2], Vf x) {
  Vd halves[2];
  widen(x, halves);
  sums[0] += halves[0];
  sums[1] += halves[1];
}

// The sum of those of `size` probabilities, with zeros up to a whole vector, that reach a bound.
KVKEYE_INLINE float sum_from(const float* p, int64_t size, float bound) {
  Vf sums[2] = {};
  for (int64_t i = 0; i < size; i += 2 * kLanes) {
    sums[0] = add_from(sums[0], load(p + i), bound);
    if (i + kLanes < size)
      sums[1] = add_from(sums[1], load(p + i + kLanes), bound);
  }
  return sum(sums[0] + sums[1]);
}

// Tokens that stand for themselves and tokens of which each stands for kSampled.
struct Tokens {
  float *exact, *sampled;
  int64_t num_exact, num_sampled;

  float mass_from(float bound) const {
    return sum_from(exact, num_exact, bound) + kSampled * sum_from(sampled, num_sampled, bound);
  }

  // Of the estimate of mass_from: the squares of what was sampled.
  float variance_from(float bound) const {
    Vf total{};
    for (int64_t i = 0; i < num_sampled; i += kLanes) {
      const Vf p = load(sampled + i), reached = add_from(Vf{}, p, bound);
      total = fma(p, reached, total);
    }
    return kSampled * kSampled * sum(total);
  }

  // The part of `range` in which mass_from falls below `mass`.
  Band fall(const Band& range, float mass, int steps) const {
    const Bracket keys =
        bisect({key_of(range.low), key_of(range.high)}, steps,
               [&](int64_t key) KVKEYE_LAMBDA { return mass_from(float_of((int32_t)key)) >= mass; });
    return {float_of((int32_t)keys.low), float_of((int32_t)keys.high)};
  }

  // The same where `mass` is off by up to `margin`.
  Band band(const Band& range, float mass, float margin) const {
    return {fall(range, mass + margin, 12).low, fall(range, mass - margin, 12).high};
  }

  // Where `share` of the mass is reached, but for four standard deviations and what sums in fp32 are off.
  Band band(float share) const {
    const Band all{kLeast, 2.0f};
    const float total = mass_from(0.0f), cut = fall(all, share * total, 8).low;
    // What is above the cut enters numerator and denominator of the share.
    const float above = variance_from(cut), below = variance_from(0.0f) - above;
    const float variance = (1.0f - share) * (1.0f - share) * above + share * share * below;
    return band(all, share * total, 4.0f * sqrtf(variance) + 0x1p-13f * total);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA
