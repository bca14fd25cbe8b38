// Complex Fourier transforms in place, as many side by side as there are columns.
//
// Forward by decimation in frequency, which leaves the frequencies in the order of their digits reversed;
// backward by decimation in time, its mirror image, which takes them so: nothing is ever sorted.
// Cooley and Tukey 1965; Gentleman and Sande 1966.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/fft.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

struct Complex {
  Vf re, im;
};

KVKEYE_INLINE Complex operator+(Complex a, Complex b) {
  return {a.re + b.re, a.im + b.im};
}
KVKEYE_INLINE Complex operator-(Complex a, Complex b) {
  return {a.re - b.re, a.im - b.im};
}
KVKEYE_INLINE Complex minus_i(Complex a) {
  return {a.im, -a.re};
}
// a factor + b
KVKEYE_INLINE Complex add_scaled(Complex a, Vf factor, Complex b) {
  return {fma(factor, a.re, b.re), fma(factor, a.im, b.im)};
}

// a times the number whose parts are stored at `factor`.
KVKEYE_INLINE Complex turn(Complex a, const float* factor) {
  const Vf re = splat(factor[0]), im = splat(factor[1]);
  return {fma(a.re, re, -(a.im * im)), fma(a.im, re, a.re * im)};
}

// Rows of complex numbers, their parts apart. Each column is one transform.
struct Columns {
  float *re, *im; // [size, vectors * kLanes], `row` floats from row to row
  int64_t row;
  int vectors;

  KVKEYE_LAMBDA Columns from(int64_t offset) const { return {re + offset, im + offset, row, vectors}; }
};

// put(k, sum over j of x[j] exp(-2 pi i j k / radix)) for every k. x is scratch afterwards.

template <class Put> KVKEYE_INLINE void butterfly_2(Complex* x, Put put) {
  put(0, x[0] + x[1]);
  put(1, x[0] - x[1]);
}

template <class Put> KVKEYE_INLINE void butterfly_4(Complex* x, Put put) {
  const Complex even = x[0] + x[2], odd = x[1] + x[3], apart = x[0] - x[2], turned = minus_i(x[1] - x[3]);
  put(0, even + odd);
  put(1, apart + turned);
  put(2, even - odd);
  put(3, apart - turned);
}

// x[j] and x[radix - j] meet the same cosine and opposite sines.
template <class Put> KVKEYE_INLINE void butterfly_odd(Complex* x, int radix, const float* roots, Put put) {
  const int half = radix / 2;
  Complex total = x[0];
#pragma GCC unroll 4
  for (int j = 1; j <= half; ++j) {
    const Complex a = x[j], b = x[radix - j];
    x[j] = a + b;
    x[radix - j] = a - b;
    total = total + x[j];
  }
  put(0, total);
#pragma GCC unroll 4
  for (int k = 1; k <= half; ++k) {
    Complex even = x[0], odd{};
    int at = 0;
#pragma GCC unroll 4
    for (int j = 1; j <= half; ++j) {
      at += at + k < radix ? k : k - radix; // j k modulo the radix
      even = add_scaled(x[j], splat(roots[2 * at]), even);
      odd = add_scaled(x[radix - j], splat(roots[2 * at + 1]), odd);
    }
    put(k, even + minus_i(odd));
    put(radix - k, even - minus_i(odd));
  }
}

enum class Twiddle { none, before, after };

// The `stage.radix` rows that start at `at`, a part of the block from each to the next.
template <int kRadix, Twiddle kTwiddle>
KVKEYE_INLINE void combine(const FftStage& stage, float* re, float* im, int64_t step, const float* twiddles) {
  const int radix = kRadix ? kRadix : stage.radix;
  Complex x[kRadix ? kRadix : kLargestRadix];
  x[0] = {load(re), load(im)};
#pragma GCC unroll 8
  for (int k = 1; k < radix; ++k) {
    x[k] = {load(re + k * step), load(im + k * step)};
    if (kTwiddle == Twiddle::before)
      x[k] = turn(x[k], twiddles + 2 * (k - 1));
  }
  const auto put = [&](int k, Complex y) KVKEYE_LAMBDA {
    if (kTwiddle == Twiddle::after && k > 0)
      y = turn(y, twiddles + 2 * (k - 1));
    store(re + k * step, y.re);
    store(im + k * step, y.im);
  };
  if constexpr (kRadix == 2)
    butterfly_2(x, put);
  else if constexpr (kRadix == 4)
    butterfly_4(x, put);
  else
    butterfly_odd(x, radix, stage.roots, put);
}

template <int kRadix, Twiddle kTwiddle>
void run_radix(const FftStage& stage, int64_t size, const Columns& z) {
  const int64_t rows = stage.length / stage.radix, step = rows * z.row;
  const auto everywhere = [&](int64_t first, auto body) KVKEYE_LAMBDA {
    for (int64_t row = first; row < size; row += stage.length)
      for (int v = 0; v < z.vectors; ++v)
        body(row * z.row + v * kLanes);
  };
  everywhere(0, [&](int64_t at) KVKEYE_LAMBDA {
    combine<kRadix, Twiddle::none>(stage, z.re + at, z.im + at, step, nullptr);
  });
  const float* twiddles = stage.twiddles;
  for (int64_t j = 1; j < rows; ++j, twiddles += 2 * (stage.radix - 1))
    everywhere(j, [&](int64_t at) KVKEYE_LAMBDA {
      combine<kRadix, kTwiddle>(stage, z.re + at, z.im + at, step, twiddles);
    });
}

template <Twiddle kTwiddle> void run(const FftStage& stage, int64_t size, const Columns& z) {
  switch (stage.radix) {
  case 2:
    return run_radix<2, kTwiddle>(stage, size, z);
  case 3:
    return run_radix<3, kTwiddle>(stage, size, z);
  case 4:
    return run_radix<4, kTwiddle>(stage, size, z);
  case 5:
    return run_radix<5, kTwiddle>(stage, size, z);
  default:
    return run_radix<0, kTwiddle>(stage, size, z);
  }
}

// Rows in order to frequencies at plan.place.
void transform(const FftPlan& plan, const Columns& z) {
  for (int s = 0; s < plan.stages; ++s)
    run<Twiddle::after>(plan.stage[s], plan.size, z);
}

// And back, times plan.size: a transform whose parts change places is the inverse with its parts changed.
void transform_back(const FftPlan& plan, const Columns& z) {
  for (int s = plan.stages - 1; s >= 0; --s)
    run<Twiddle::before>(plan.stage[s], plan.size, {z.im, z.re, z.row, z.vectors});
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
