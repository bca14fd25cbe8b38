// Candidates in the order of rank (probability, on ties the lower id) or of the vocabulary, without a
// library.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/sampling.h"

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

struct Falling {
  KVKEYE_INLINE bool before(float a, float b) { return a > b; }
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

// The k-th largest of the maxima of blocks, which are followed by as much free memory.
KVKEYE_INLINE float kth_peak(float* peaks, int64_t blocks, int64_t k) {
  float* copy = peaks + blocks;
  std::memcpy(copy, peaks, blocks * sizeof(float));
  select<Falling>(copy, blocks, k);
  float least = copy[0];
  for (int64_t i = 1; i < k && i < blocks; ++i)
    least = copy[i] < least ? copy[i] : least;
  return least;
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
