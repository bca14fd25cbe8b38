// Vectors of fp64 beside simd.h's fp32 ones: half as many lanes.
#pragma once

#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {

inline constexpr int kDoubles = kLanes / 2;

typedef double Vd __attribute__((vector_size(kLanes * 4)));
typedef int64_t Vl __attribute__((vector_size(kLanes * 4)));
typedef float Vnarrow __attribute__((vector_size(kLanes * 2)));

KVKEYE_INLINE Vd splat_double(double value) {
  return value - Vd{};
}

KVKEYE_INLINE Vd fma(Vd a, Vd b, Vd c) {
#if defined(__AVX512F__)
  return (Vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Adding it rounds to an integer, which then is the lower part of the bits.
inline constexpr double kRoundingMagic = 0x1.8p52;

// exp(x) to about an ulp, exactly 1 at 0: x = n ln2 + r, a Taylor polynomial of degree 13 in r (remainder
// 4e-18), 2^n in two halves. NaN gives 0.
KVKEYE_INLINE Vd exp(Vd x) {
  const Vd low = splat_double(-750.0), high = splat_double(710.0);
  const Vd bounded = x > low ? x : low, clamped = bounded < high ? bounded : high;
  const Vd shifted = fma(clamped, splat_double(1.4426950408889634), splat_double(kRoundingMagic));
  const Vd n = shifted - kRoundingMagic;
  Vd r = fma(n, splat_double(-6.93147180369123816490e-01), clamped); // the leading 32 bits of ln2
  r = fma(n, splat_double(-1.90821492927058770002e-10), r);
  constexpr double kInverseFactorials[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                           1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                           1.0 / 24,        1.0 / 6,        1.0 / 2};
  Vd sum = splat_double(1.0 / 6227020800);
  for (const double term : kInverseFactorials)
    sum = fma(sum, r, splat_double(term));
  sum = fma(sum * r, r, r) + 1.0;
  const Vl exponent = (Vl)shifted - (Vl)splat_double(kRoundingMagic), half = exponent >> 1;
  const Vd value = sum * (Vd)((half + 1023) << 52) * (Vd)((exponent - half + 1023) << 52);
  return x == x ? value : Vd{};
}

struct SineCosine {
  Vd sine, cosine;
};

// Both to 2e-9 for |x| up to 1e9: x = n pi/2 + r with |r| <= pi/4, Taylor polynomials of degrees 11 and 12.
KVKEYE_INLINE SineCosine sine_cosine(Vd x) {
  const Vd shifted = fma(x, splat_double(0.63661977236758138), splat_double(kRoundingMagic));
  const Vd n = shifted - kRoundingMagic;
  Vd r = fma(n, splat_double(-1.57079632673412561417e+00), x); // the leading 33 bits of pi/2
  r = fma(n, splat_double(-6.07710050650619224932e-11), r);
  const Vd square = r * r;
  Vd sine = splat_double(-1.0 / 39916800), cosine = splat_double(1.0 / 479001600);
  constexpr double kSine[] = {1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6};
  constexpr double kCosine[] = {-1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -1.0 / 2, 1.0};
  for (const double term : kSine)
    sine = fma(sine, square, splat_double(term));
  for (const double term : kCosine)
    cosine = fma(cosine, square, splat_double(term));
  sine = fma(sine * square, r, r);
  const Vl quarter = (Vl)shifted - (Vl)splat_double(kRoundingMagic), is_odd = (quarter & 1) != 0;
  const Vd first = is_odd ? cosine : sine, second = is_odd ? sine : cosine;
  return {(quarter & 2) != 0 ? -first : first, ((quarter + 1) & 2) != 0 ? -second : second};
}

} // namespace kvkeye::KVKEYE_ISA
