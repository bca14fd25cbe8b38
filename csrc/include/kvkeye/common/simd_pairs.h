// Two vectors at a time, their lanes in the order that costs least: for what treats every element alike.
// Twice 16 bf16 are widened and rounded by half the instructions that each vector would take alone.
#pragma once

#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {

inline constexpr int kPair = 2 * kLanes;

// kPair elements side by side. With AVX-512 those of bf16 lie in turn in the one vector and the other, else
// the first half in the first.
struct Pair {
  Vf part[2];
};

KVKEYE_INLINE Pair load_pair(const float* source) {
  return {{load(source), load(source + kLanes)}};
}

KVKEYE_INLINE void store_pair(float* target, const Pair& pair) {
  store(target, pair.part[0]);
  store(target + kLanes, pair.part[1]);
}

KVKEYE_INLINE Pair operator*(const Pair& a, const Pair& b) {
  return {{a.part[0] * b.part[0], a.part[1] * b.part[1]}};
}
KVKEYE_INLINE Pair operator*(const Pair& a, float b) {
  return {{a.part[0] * b, a.part[1] * b}};
}
KVKEYE_INLINE Pair operator+(const Pair& a, const Pair& b) {
  return {{a.part[0] + b.part[0], a.part[1] + b.part[1]}};
}
KVKEYE_INLINE Pair operator-(const Pair& a, const Pair& b) {
  return {{a.part[0] - b.part[0], a.part[1] - b.part[1]}};
}

#if defined(__AVX512F__)

typedef uint16_t Words __attribute__((vector_size(kPair * 2)));

KVKEYE_INLINE Pair widen(Words words) {
  return {{(Vf)((Vu)words << 16), (Vf)((Vu)words & 0xffff0000u)}};
}

// Two halves in turn.
KVKEYE_INLINE Words in_turn(Words words) {
  constexpr Words kOrder = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (Words)_mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)kOrder, (__m512i)words);
}

// Subnormal numbers become 0 and a NaN keeps its digits.
KVKEYE_INLINE Words narrow_normal(const Pair& pair) {
  return in_turn((Words)_mm512_maskz_cvtne2ps_pbh(0xffffffff, (__m512)pair.part[1], (__m512)pair.part[0]));
}

KVKEYE_INLINE Pair load_pair(const bf16* source) {
  Words words;
  std::memcpy(&words, source, sizeof words);
  return widen(words);
}

KVKEYE_INLINE void store_pair(bf16* target, const Pair& pair) {
  const __m512 first = (__m512)pair.part[0], second = (__m512)pair.part[1];
  Words words = narrow_normal(pair);
  if (__builtin_expect(!_mm512_kortestz(_mm512_fpclass_ps_mask(first, kSubnormalOrNan),
                                        _mm512_fpclass_ps_mask(second, kSubnormalOrNan)),
                       0)) {
    const Vh halves[2] = {narrow(pair.part[0]), narrow(pair.part[1])};
    std::memcpy(&words, halves, sizeof words);
    words = in_turn(words);
  }
  std::memcpy(target, &words, sizeof words);
}

#else

KVKEYE_INLINE Pair load_pair(const bf16* source) {
  return {{load(source), load(source + kLanes)}};
}

KVKEYE_INLINE void store_pair(bf16* target, const Pair& pair) {
  store(target, pair.part[0]);
  store(target + kLanes, pair.part[1]);
}

#endif

// Numbers between two steps, as they read back after being stored as T; those below 2^-126 may become 0.
template <class T> KVKEYE_INLINE Pair rounded(const Pair& pair) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(bf16))
    return widen(narrow_normal(pair));
#endif
  return {{rounded<T>(pair.part[0]), rounded<T>(pair.part[1])}};
}

// Calls pairs(offset) as long as there are whole ones, then vectors(offset, lanes) for the rest.
template <class Pairs, class Vectors>
KVKEYE_INLINE void for_pairs(int64_t begin, int64_t end, Pairs pairs, Vectors vectors) {
  int64_t i = begin;
  for (; i + kPair <= end; i += kPair)
    pairs(i);
  for_vectors(i, end, vectors);
}

// y[i] = each(x[i]...) over [begin, end); each takes pairs and, for the rest, vectors. y may be one of x.
template <class T, class Each, class... X>
KVKEYE_INLINE void map_pairs(int64_t begin, int64_t end, T* y, const Each& each, const X*... x) {
  for_pairs(
      begin, end, [&](int64_t i) KVKEYE_LAMBDA { store_pair(y + i, each(load_pair(x + i)...)); },
      [&](int64_t i, int lanes) KVKEYE_LAMBDA { store(y + i, each(load(x + i, lanes)...), lanes); });
}

template <class Each, class... Rest>
KVKEYE_INLINE Pair each_part(const Each& each, const Pair& first, const Rest&... rest) {
  return {{each(first.part[0], rest.part[0]...), each(first.part[1], rest.part[1]...)}};
}

template <class Each, class... Rest>
KVKEYE_INLINE Vf each_part(const Each& each, const Vf& first, const Rest&... rest) {
  return each(first, rest...);
}

// The same where each takes vectors.
template <class T, class Each, class... X>
KVKEYE_INLINE void map_vectors(int64_t begin, int64_t end, T* y, const Each& each, const X*... x) {
  map_pairs(
      begin, end, y, [&](const auto&... values) KVKEYE_LAMBDA { return each_part(each, values...); }, x...);
}

// The sum of each(x[i]) over [0, size), in one order for each storage type.
template <class T, class Each> KVKEYE_INLINE float sum_of(const T* x, int64_t size, Each each) {
  return sum_levels(size, [&](int64_t begin, int64_t end) KVKEYE_LAMBDA {
    Vf part{};
    for_pairs(
        begin, end,
        [&](int64_t i) KVKEYE_LAMBDA {
          const Pair pair = load_pair(x + i);
          part += each(pair.part[0]);
          part += each(pair.part[1]);
        },
        [&](int64_t i, int lanes) KVKEYE_LAMBDA { part += keep(each(load(x + i, lanes)), lanes); });
    return part;
  });
}

// Numbers in the order in which pairs of T hold their lanes, in place; what makes no whole pair stays.
template <class T> KVKEYE_INLINE void order_as_pairs(float* values, int64_t size) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(bf16))
    for (int64_t i = 0; i + kPair <= size; i += kPair) {
      const Pair p = load_pair(values + i);
      store_pair(values + i, {{__builtin_shufflevector(p.part[0], p.part[1], 0, 2, 4, 6, 8, 10, 12, 14, 16,
                                                       18, 20, 22, 24, 26, 28, 30),
                               __builtin_shufflevector(p.part[0], p.part[1], 1, 3, 5, 7, 9, 11, 13, 15, 17,
                                                       19, 21, 23, 25, 27, 29, 31)}});
    }
#else
  (void)values, (void)size;
#endif
}

} // namespace kvkeye::KVKEYE_ISA
