// The fp32 probabilities of draws keep within the error that is allowed for, whatever the temperature.
#include "sampling_fast.h"

#include <stdio.h>

#include <random>

namespace kvkeye::KVKEYE_ISA {
namespace {

// The largest relative error of probabilities down to kLeast of one row.
double error_of_row(std::mt19937_64& random) {
  using Real = std::uniform_real_distribution<double>;
  const double temperature = exp2(Real(-12, 12)(random));
  const float peak = (float)(Real(-300, 300)(random) * (temperature < 1.0 ? temperature : 1.0));
  const Softmax exact = Softmax::of(peak, temperature);
  if (!FastSoftmax::fits(exact))
    return INFINITY;
  const FastSoftmax fast(exact);
  double worst = 0.0;
  for (int i = 0; i < 64; ++i) {
    Vf logit;
    for (int lane = 0; lane < kLanes; ++lane)
      logit[lane] = peak - (float)(Real(0, 44)(random) * temperature);
    const Vf found = fast.of(logit);
    for (int lane = 0; lane < kLanes; ++lane) {
      const long double truth = expl((long double)logit[lane] * exact.inverse - exact.offset);
      if (truth >= kLeast)
        worst = fmax(worst, fabs((double)((found[lane] - truth) / truth)));
    }
  }
  return worst;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA

int main() {
  using namespace kvkeye::KVKEYE_ISA;
  std::mt19937_64 random(1);
  for (int row = 0; row < 4000; ++row)
    if (const double error = error_of_row(random); !(error <= kFastError)) {
      fprintf(stderr, "row %d: a probability is off by %.3g of itself, allowed are %.3g\n", row, error,
              kFastError);
      return 1;
    }
}
