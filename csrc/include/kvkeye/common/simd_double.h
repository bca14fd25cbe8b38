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

KVKEYE_INLINE void widen(Vf x, Vd (&halves)[2]) {
#if defined(__AVX512F__)
  halves[0] = (Vd)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0));
  halves[1] = (Vd)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
#else
  Vnarrow part[2];
  std::memcpy(part, &x, sizeof part);
  halves[0] = __builtin_convertvector(part[0], Vd);
  halves[1] = __builtin_convertvector(part[1], Vd);
#endif
}

KVKEYE_INLINE Vf narrow(const Vd (&halves)[2]) {
  Vf x;
  const Vnarrow part[2] = {__builtin_convertvector(halves[0], Vnarrow),
                           __builtin_convertvector(halves[1], Vnarrow)};
  std::memcpy(&x, part, sizeof x);
  return x;
}

// Adding it rounds to an integer, which then is the lower part of the bits.
inline constexpr double kRoundingMagic = 0x1.8p52;

// exp(x) to about an ulp, exactly 1 at 0, for x up to 710; NaN gives 0. With permutations and scaling in
// hardware: x = n ln2 / 16 + r, a table of 2^(i / 16), a Taylor polynomial of degree 7 in r (remainder
// 1e-18). Without: x = n ln2 + r, one of degree 13 (remainder 4e-18), 2^n in two halves.
KVKEYE_INLINE Vd exp(Vd x) {
#if defined(__AVX512F__)
  static constexpr double kPowers[16] = {
      0x1.0000000000000p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
      0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0,
      0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
      0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0};
  const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(-746.0), _CMP_GT_OQ);
  const Vd shifted = fma(x, splat_double(0x1.71547652b82fep+4), splat_double(kRoundingMagic));
  const Vd n = shifted - kRoundingMagic;
  Vd r = fma(n, splat_double(-6.93147180369123816490e-01 / 16), x); // the leading 32 bits of ln2
  r = fma(n, splat_double(-1.90821492927058770002e-10 / 16), r);
  constexpr double kInverseFactorials[] = {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2};
  Vd sum = splat_double(1.0 / 5040);
  for (const double term : kInverseFactorials)
    sum = fma(sum, r, splat_double(term));
  sum = fma(sum * r, r, r);
  const __m512d power = _mm512_permutex2var_pd(_mm512_loadu_pd(kPowers), (__m512i)shifted,
                                               _mm512_loadu_pd(kPowers + 8)); // by the last four bits of n
  return (Vd)_mm512_maskz_scalef_pd(normal, (__m512d)fma((Vd)power, sum, (Vd)power),
                                    (__m512d)(n * 0.0625)); // of which it takes the integer below
#else
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
#endif
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
