// Checks common/simd.h and simd_pairs.h of one instruction set: exit status 0, or the first broken promise on
// stderr.
#include "kvkeye/common/simd_pairs.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <sys/mman.h>
#include <unistd.h>

using namespace kvkeye;
using namespace kvkeye::KVKEYE_ISA;

namespace {

void check(bool good, const char* what, double at) {
  if (good)
    return;
  std::fprintf(stderr, "%s, at %.9g\n", what, at);
  std::exit(1);
}

float lane(Vf value, int i) {
  float lanes[kLanes];
  store(lanes, value);
  return lanes[i];
}

// exp against double precision, in units of the last place of the true value.
void test_exp() {
  double worst = 0, worst_at = 0;
  for (float x = -103.0f; x < 88.72f; x += 0.00131f) {
    const double truth = std::exp((double)x);
    const float nearest = (float)truth;
    const double ulp = (double)std::nextafter(nearest, INFINITY) - (double)nearest;
    const double error = std::fabs((double)lane(exp(splat(x)), 0) - truth) / ulp;
    if (error > worst)
      worst = error, worst_at = x;
  }
  check(worst <= 2.0, "exp is off by more than 2 ulp", worst_at);
  check(lane(exp(splat(-INFINITY)), 0) == 0.0f, "exp(-inf) is not 0", 0);
  check(lane(exp(splat(INFINITY)), 0) == INFINITY, "exp(inf) is not inf", 0);
  check(lane(exp(splat(-200.0f)), 0) == 0.0f, "exp(-200) is not 0", 0);
  check(lane(exp(splat(100.0f)), 0) == INFINITY, "exp(100) is not inf", 0);
  check(lane(exp(splat(0.0f)), 0) == 1.0f, "exp(0) is not 1", 0);
  check(std::isnan(lane(exp(splat(NAN)), 0)), "exp(nan) is not nan", 0);
}

// Nearest, ties to even, by exact arithmetic on the two neighbours.
uint16_t nearest_bf16(float value) {
  if (std::isnan(value))
    return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rest = bits & 0xffff, kept = bits >> 16;
  const bool up = rest > 0x8000 || (rest == 0x8000 && (kept & 1));
  return (uint16_t)(kept + up);
}

void test_rounding() {
  uint64_t state = 1;
  for (int i = 0; i < 400000; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    uint32_t bits = (uint32_t)(state >> 32);
    if (i % 3 == 0)
      bits = (bits & 0xffff0000u) | 0x8000u; // a tie
    float value;
    std::memcpy(&value, &bits, sizeof value);
    bf16 found[kLanes];
    store(found, splat(0.0f));
    store(found, Vf{} == Vf{} ? (Vf)(Vu{} + bits) : Vf{});
    check(found[0].bits == nearest_bf16(value), "bf16 is not rounded to nearest even", value);
    const float back = lane(load(found), 0);
    uint32_t back_bits;
    std::memcpy(&back_bits, &back, sizeof back_bits);
    check(back_bits == (uint32_t)found[0].bits << 16, "bf16 does not widen exactly", value);
  }
}

// A partial access at the very end of a mapped page must not touch the next one, which faults.
template <class T> void test_partial() {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  char* memory = (char*)mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(memory != MAP_FAILED && mprotect(memory + page, page, PROT_NONE) == 0, "no guard page", 0);
  for (int count = 0; count <= kLanes; ++count) {
    T* at = (T*)(memory + page) - count;
    store(at, splat(3.0f), count);
    const Vf value = load(at, count);
    for (int i = 0; i < kLanes; ++i)
      check(lane(value, i) == (i < count ? 3.0f : 0.0f), "a partial access reads or writes wrong lanes",
            count);
    check(sum(keep(value + 1.0f, count)) == 4.0f * count, "keep does not zero the other lanes", count);
  }
  munmap(memory, 2 * page);
}

void test_sums() {
  float values[3 * kLanes + 1], rows[3 * kLanes + 1], most = -INFINITY;
  const int64_t size = 3 * kLanes + 1;
  for (int64_t i = 0; i < size; ++i) {
    values[i] = (float)((i * 37) % 11);
    most = values[i] > most && i < kLanes ? values[i] : most;
  }
  float total = 0;
  for (float value : values)
    total += value;
  const auto term = [&](int64_t i, int lanes) KVKEYE_LAMBDA { return load(values + i, lanes); };
  check(sum_vectors(size, term) == total, "sum_vectors is wrong", (double)total);
  check(largest(load(values)) == most, "largest is wrong", (double)most);
  for (int64_t count : {1, 15, 16, 17, 300}) {
    for (int64_t block = 0; block < blocks_of(size, kColumnBlock); ++block)
      sum_rows(block, size, count, rows, [&](int64_t row, int64_t i, int lanes) KVKEYE_LAMBDA {
        return load(values + i, lanes) + (float)row;
      });
    for (int64_t i = 0; i < size; ++i)
      check(rows[i] == (float)count * values[i] + (float)(count * (count - 1) / 2), "sum_rows is wrong",
            (double)i);
  }
}

template <class T> T stored(float value) {
  T one[kLanes];
  store(one, splat(value));
  return one[0];
}

template <class T> float number(const T& value) {
  T same[kLanes];
  for (T& one : same)
    one = value;
  return lane(load(same), 0);
}

// Every element of a pair goes to its place and is rounded as a vector's, special values among normal ones
// too.
template <class T> void test_pairs() {
  constexpr int64_t size = 3 * kPair + kLanes + 1;
  const float special[] = {1.0f, NAN, 1e-40f, -INFINITY, 0.0f, -1e-39f, 0x1.01p0f, 0x1.03p0f};
  for (int place = -1; place < size; ++place) {
    T x[size], other[size], y[size];
    for (int64_t i = 0; i < size; ++i)
      x[i] = stored<T>((float)(i * i - 40)), other[i] = stored<T>(1.0f);
    if (place >= 0)
      x[place] = stored<T>(special[place % 8]);
    map_vectors(0, size, y, [](Vf a, Vf b) KVKEYE_LAMBDA { return a * 1.0009765625f + b * 0.0f; }, x, other);
    for (int64_t i = 0; i < size; ++i) {
      const T expected = stored<T>(number(x[i]) * 1.0009765625f + 0.0f);
      check(std::memcmp(&y[i], &expected, sizeof expected) == 0 || std::isnan(number(x[i])),
            "map_vectors is wrong", (double)i);
      check(std::isnan(number(y[i])) == std::isnan(number(x[i])), "map_vectors loses a NaN", (double)i);
    }
    if (place >= 0)
      continue;
    const float total = sum_of(x, size, [](Vf value) KVKEYE_LAMBDA { return value - 1.0f; });
    float exact = 0;
    for (const T& value : x)
      exact += number(value) - 1.0f;
    check(total == exact, "sum_of is wrong", (double)exact);
  }
}

// A table in the order of pairs meets its elements, and rounding between two steps is the rounding of a
// store.
template <class T> void test_order_of_pairs() {
  float table[2 * kPair + 3];
  T x[kPair], product[kPair], back[kPair];
  for (int i = 0; i < 2 * kPair + 3; ++i)
    table[i] = (float)i;
  for (int i = 0; i < kPair; ++i)
    x[i] = stored<T>(1.0f + (float)i / 64.0f);
  order_as_pairs<T>(table, 2 * kPair + 3);
  for (int i = 2 * kPair; i < 2 * kPair + 3; ++i)
    check(table[i] == (float)i, "order_as_pairs moves the rest", i);
  const Pair scaled = load_pair(x) * load_pair((const float*)table + kPair);
  store_pair(product, scaled);
  store_pair(back, rounded<T>(scaled));
  for (int i = 0; i < kPair; ++i)
    check(number(product[i]) == number(stored<T>(number(x[i]) * (float)(kPair + i))),
          "order_as_pairs is wrong", i);
  check(std::memcmp(product, back, sizeof back) == 0, "rounded pairs differ from stored ones", 0);
}

void test_comparisons() {
  const Vf nan = splat(NAN), one = splat(1.0f);
  check(lane(max(nan, one), 0) == 1.0f && std::isnan(lane(max(one, nan), 0)),
        "max does not return its second", 0);
  check(lane(min(nan, one), 0) == 1.0f && std::isnan(lane(min(one, nan), 0)),
        "min does not return its second", 0);
  check(lane(fma(splat(3.0f), splat(4.0f), splat(5.0f)), kLanes - 1) == 17.0f, "fma is wrong", 0);
}

} // namespace

int main() {
  test_exp();
  test_rounding();
  test_partial<float>();
  test_partial<bf16>();
  test_sums();
  test_pairs<float>();
  test_pairs<bf16>();
  test_order_of_pairs<float>();
  test_order_of_pairs<bf16>();
  test_comparisons();
  return 0;
}
