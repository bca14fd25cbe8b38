// Candidates in the order of rank (probability, on ties the lower id) or of the vocabulary, without a
// library.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/sampling.h"

#include <math.h>

namespace kvkeye::KVKEYE_ISA {
namespace {

struct ByRank {
  KVKEYE_INLINE bool before(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  }
};

struct ById {
  KVKEYE_INLINE bool before(const Candidate& a, const Candidate& b) { return a.id < b.id; }
};

template <class Item> KVKEYE_INLINE void exchange(Item& a, Item& b) {
  const Item c = a;
  a = b;
  b = c;
}

template <class Order, class Item> void insertion_sort(Item* c, int64_t size) {
  for (int64_t i = 1; i < size; ++i) {
    const Item moved = c[i];
    int64_t j = i;
    for (; j > 0 && Order::before(moved, c[j - 1]); --j)
      c[j] = c[j - 1];
    c[j] = moved;
  }
}

// Hoare's partition around the median of three: all of [0, result) come before all of [result, size).
template <class Order, class Item> int64_t partition(Item* c, int64_t size) {
  Item &low = c[0], &middle = c[size / 2], &high = c[size - 1];
  if (Order::before(middle, low))
    exchange(middle, low);
  if (Order::before(high, middle))
    exchange(high, middle);
  if (Order::before(middle, low))
    exchange(middle, low);
  const Item pivot = middle;
  int64_t i = 0, j = size - 1;
  for (;;) {
    while (Order::before(c[i], pivot))
      ++i;
    while (Order::before(pivot, c[j]))
      --j;
    if (i >= j)
      return j + 1;
    exchange(c[i++], c[j--]);
  }
}

constexpr int64_t kSmall = 16;

// The first `count` of the order, in no order themselves, come first.
template <class Order, class Item> void select(Item* c, int64_t size, int64_t count) {
  while (size > kSmall && count > 0 && count < size) {
    const int64_t split = partition<Order>(c, size);
    if (count <= split) {
      size = split;
    } else {
      c += split;
      size -= split;
      count -= split;
    }
  }
  insertion_sort<Order>(c, size <= kSmall ? size : 0);
}

template <class Order, class Item> void sort(Item* c, int64_t size) {
  while (size > kSmall) {
    const int64_t split = partition<Order>(c, size);
    const bool left_smaller = split < size - split;
    sort<Order>(left_smaller ? c : c + split, left_smaller ? split : size - split);
    c = left_smaller ? c + split : c;
    size = left_smaller ? size - split : split;
  }
  insertion_sort<Order>(c, size);
}

// Two numbers whose distance has been halved `steps` times, or is 1: `low` passes the test and `high` does
// not, where they did before.
struct Bracket {
  int64_t low, high;
};
template <class Test> KVKEYE_INLINE Bracket bisect(Bracket at, int steps, Test passes) {
  for (; steps > 0 && at.high - at.low > 1; --steps) {
    const int64_t middle = at.low + (at.high - at.low) / 2;
    (passes(middle) ? at.low : at.high) = middle;
  }
  return at;
}

// Floats in their order as integers, and back.
KVKEYE_INLINE int32_t key_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
KVKEYE_INLINE float float_of(int32_t key) {
  const int32_t bits = key ^ (key >> 31 & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

KVKEYE_INLINE float next_above(float x) {
  return float_of(key_of(x) + 1);
}

// The largest number that k of the values reach, none of which is a NaN.
KVKEYE_INLINE float kth_largest(const float* values, int64_t size, int64_t k) {
  const auto is_reached = [&](int64_t key) KVKEYE_LAMBDA {
    const float bound = float_of((int32_t)key);
    int64_t count = 0, i = 0;
    for (; i + kLanes <= size; i += kLanes)
      count += __builtin_popcount(bits_from(load(values + i), bound));
    for (; i < size; ++i)
      count += values[i] >= bound;
    return count >= k;
  };
  return float_of((int32_t)bisect({key_of(-INFINITY), key_of(INFINITY) + 1}, 32, is_reached).low);
}

// Top-p over candidates as it is defined: one stays if the mass before it is below the share, the first one
// always. Leaves them ranked and returns how many stay.
int64_t keep_share(Candidate* c, int64_t size, double share) {
  sort<ByRank>(c, size);
  double total = 0.0, mass = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += c[i].value;
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i) {
    mass += c[i].value;
    if (i == 0 || mass - c[i].value < share * total)
      c[kept++] = c[i];
  }
  return kept;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
