// Weights of an antialiased, separable resize of 8-bit pictures, as integers: one axis at a time.
//
// Built once per call on the host in double precision and used by the CPU and the CUDA kernel, so that both
// give the same levels. Every output is clip8((sum of weight * level + half) >> precision), half = 1 <<
// (precision - 1), horizontally first, rounded to 8 bits between the passes.
//  bicubic   a = -0.5, 22 digits: the levels of Pillow up to version 12
//  bilinear  as many digits as keep the largest weight in int16: the levels of PyTorch's uint8 interpolation
#pragma once

#include <cmath>
#include <cstdint>

namespace kvkeye {

enum class Filter : int32_t { bicubic, bilinear };

// One axis: for each output, which inputs it is made of and with which weights.
struct ResampleAxis {
  int64_t in, out;
  int32_t taps;      // weights kept per output
  int32_t precision; // fixed-point digits of the weights
  int32_t* first;    // [out], the first input
  int32_t* count;    // [out], inputs from there on, 1 to taps
  int32_t* weights;  // [out, taps], zero from count on
};

// How many inputs reach one output at most.
inline int32_t resample_taps(int64_t in, int64_t out, Filter filter) {
  const double scale = (double)in / (double)out;
  const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * (scale > 1.0 ? scale : 1.0);
  return (int32_t)std::ceil(support) * 2 + 1;
}

inline double filter_value(Filter filter, double x) {
  constexpr double a = -0.5;
  x = x < 0.0 ? -x : x;
  if (filter == Filter::bilinear)
    return x < 1.0 ? 1.0 - x : 0.0;
  if (x < 1.0)
    return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

// Fills `value` with the weights of one output, which sum to one, and its bounds.
inline void resample_weights(const ResampleAxis& axis, Filter filter, int64_t output, double* value) {
  const double scale = (double)axis.in / (double)axis.out;
  const double stretch = scale > 1.0 ? scale : 1.0, shrink = 1.0 / stretch;
  const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * stretch;
  const double centre = ((double)output + 0.5) * scale;
  int64_t low = (int64_t)(centre - support + 0.5), high = (int64_t)(centre + support + 0.5);
  low = low < 0 ? 0 : low;
  high = high > axis.in ? axis.in : high;
  high = high - low > axis.taps ? low + axis.taps : high;
  double total = 0.0;
  for (int64_t i = low; i < high; ++i) {
    value[i - low] = filter_value(filter, ((double)i - centre + 0.5) * shrink);
    total += value[i - low];
  }
  for (int64_t i = 0; i < high - low && total != 0.0; ++i)
    value[i] /= total;
  axis.first[output] = (int32_t)low;
  axis.count[output] = (int32_t)(high - low);
}

// Digits with which the largest weight still fits into 16 bits, at most 22.
inline int32_t int16_precision(double largest) {
  int32_t precision = 0;
  while (precision < 22 && (int64_t)(0.5 + largest * (double)((int64_t)1 << (precision + 1))) < (1 << 15))
    ++precision;
  return precision;
}

inline int32_t fixed_point(double value, int32_t precision) {
  const double scaled = value * (double)((int64_t)1 << precision);
  return (int32_t)(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5); // half away from zero
}

// Fills first, count, weights and precision; `in`, `out` and `taps` are set. `scratch` holds out * taps
// doubles.
inline void fill_resample(ResampleAxis& axis, Filter filter, double* scratch) {
  double largest = 0.0;
  for (int64_t output = 0; output < axis.out; ++output) {
    double* value = scratch + output * axis.taps;
    resample_weights(axis, filter, output, value);
    for (int32_t i = 0; i < axis.count[output]; ++i)
      largest = value[i] > largest ? value[i] : largest;
  }
  axis.precision = filter == Filter::bicubic ? 22 : int16_precision(largest);
  for (int64_t output = 0; output < axis.out; ++output)
    for (int32_t i = 0; i < axis.taps; ++i)
      axis.weights[output * axis.taps + i] =
          i < axis.count[output] ? fixed_point(scratch[output * axis.taps + i], axis.precision) : 0;
}

} // namespace kvkeye
