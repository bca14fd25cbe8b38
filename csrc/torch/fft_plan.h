// The tables of a Fourier transform, computed in fp64.
#pragma once

#include "checks.h"
#include "kvkeye/fft.h"

#include <cmath>

namespace kvkeye {

// Factors 4 first; the larger ones come last, where blocks are short and have few twiddles or none.
inline std::vector<int> fft_radices(const char* op, const char* axis, int64_t size) {
  std::vector<int> found;
  int64_t rest = size;
  for (; rest % 4 == 0; rest /= 4)
    found.push_back(4);
  for (int64_t radix = 2; radix <= kLargestRadix; ++radix)
    for (; rest % radix == 0; rest /= radix)
      found.push_back((int)radix);
  require(rest == 1, op, ": ", axis, " ", size, " has a prime factor above ", kLargestRadix,
          "; the C++ transform takes smaller ones. Use the eager backend.");
  return found;
}

class FftTables {
public:
  FftTables(const char* op, const char* axis, int64_t size)
      : radices_(fft_radices(op, axis, size)), place_(size, 0) {
    int64_t length = size, before = 1;
    for (const int radix : radices_) {
      const int64_t rows = length / radix;
      for (int64_t j = 1; j < rows; ++j)
        for (int64_t k = 1; k < radix; ++k)
          add(twiddles_, -j * k, length);
      for (int64_t k = 0; k < radix; ++k)
        add(roots_, k, radix);
      for (int64_t frequency = 0; frequency < size; ++frequency)
        place_[frequency] += frequency / before % radix * rows;
      length = rows;
      before *= radix;
    }
  }

  // Points into these tables.
  FftPlan plan() const {
    FftPlan found{};
    found.size = (int64_t)place_.size();
    found.place = place_.data();
    const float *twiddles = twiddles_.data(), *roots = roots_.data();
    int64_t length = found.size;
    for (const int radix : radices_) {
      found.stage[found.stages++] = {length, radix, twiddles, roots};
      length /= radix;
      twiddles += 2 * (length - 1) * (radix - 1);
      roots += 2 * radix;
    }
    return found;
  }

private:
  static void add(std::vector<float>& table, int64_t part, int64_t whole) {
    const double angle = 2 * std::acos(-1.0) * (double)(part % whole) / (double)whole;
    table.push_back((float)std::cos(angle));
    table.push_back((float)std::sin(angle));
  }

  std::vector<int> radices_;
  std::vector<float> twiddles_, roots_;
  std::vector<int64_t> place_;
};

} // namespace kvkeye
