// One pass over a row's logits: mask, penalties and the maxima of blocks together.
//
// Penalised tokens are few. They are hidden from the pass like masked ones and kept beside it, in fp64.
#pragma once

#include "kvkeye/common/simd.h"
#include "kvkeye/sampling.h"

#include <math.h>

namespace kvkeye::KVKEYE_ISA {
namespace {

KVKEYE_INLINE float value_of(float x) {
  return x;
}
KVKEYE_INLINE float value_of(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A row as it is read: `words` holds the bits of its visible tokens, or is null where all are.
template <class T> struct Row {
  const T* logits;
  const uint32_t* words;
  int64_t size;

  KVKEYE_LAMBDA bool shows(int64_t i) const { return words == nullptr || (words[i / 32] >> (i % 32) & 1u); }

  // Hidden tokens and lanes past the end are -inf.
  KVKEYE_LAMBDA Vf read(int64_t i, int lanes) const {
    const Vf value = load(logits + i, lanes);
    if (words == nullptr && lanes == kLanes)
      return value;
    static constexpr int32_t kBits[16] = {1 << 0,  1 << 1,  1 << 2,  1 << 3, 1 << 4,  1 << 5,
                                          1 << 6,  1 << 7,  1 << 8,  1 << 9, 1 << 10, 1 << 11,
                                          1 << 12, 1 << 13, 1 << 14, 1 << 15};
    Vi bit;
    std::memcpy(&bit, kBits, sizeof bit);
    const uint32_t word = words == nullptr ? ~0u : words[i / 32] >> (i % 32);
    return ((int32_t)(word & ((1u << lanes) - 1)) & bit) != 0 ? value : splat(-INFINITY);
  }
};

KVKEYE_INLINE PastToken& place_of(PastToken* table, int64_t places, int32_t id) {
  int64_t at = (int64_t)((uint32_t)id * 2654435769u) & (places - 1);
  while (table[at].id != id && table[at].id >= 0)
    at = (at + 1) & (places - 1);
  return table[at];
}

// Takes the penalised tokens of row b out of `words`; returns how many now lie in work.penalised.
template <class T> int64_t penalise(const SampleParams<T>& p, int64_t b, uint32_t* words) {
  const int64_t first = p.cu_history[b], end = p.cu_history[b + 1];
  const double repetition = p.repetition[b], presence = p.presence[b], frequency = p.frequency[b];
  const int64_t places = past_places(end - first);
  PastToken* table = p.work.past;
  for (int64_t i = 0; i < places; ++i)
    table[i] = {-1, 0};
  for (int64_t i = first; i < end; ++i) {
    PastToken& token = place_of(table, places, p.history[i]);
    token.id = p.history[i];
    token.count += i - first >= p.num_prompt[b];
  }
  int64_t found = 0;
  for (int64_t i = 0; i < places; ++i) {
    const auto [id, count] = table[i];
    if (id < 0 || (words[id / 32] >> (id % 32) & 1u) == 0)
      continue;
    words[id / 32] &= ~(1u << (id % 32));
    double value = value_of(p.logits[b * p.logits_stride + id]);
    if (repetition != 1.0)
      value = value > 0.0 ? value / repetition : value * repetition;
    if (count > 0 && (presence != 0.0 || frequency != 0.0))
      value = value - frequency * (double)count - presence;
    p.work.penalised[found++] = {value, id};
  }
  return found;
}

template <class T> KVKEYE_INLINE bool is_penalised(const SampleParams<T>& p, int64_t b) {
  return p.cu_history[b] < p.cu_history[b + 1] &&
         (p.repetition[b] != 1.0f || p.presence[b] != 0.0f || p.frequency[b] != 0.0f);
}

// What row b looks like after the mask and the penalties.
template <class T> KVKEYE_INLINE Row<T> row_of(const SampleParams<T>& p, int64_t b, int64_t& num_penalised) {
  Row<T> row{p.logits + b * p.logits_stride, nullptr, p.vocabulary};
  const int64_t size = (p.vocabulary + 31) / 32;
  num_penalised = 0;
  if (p.mask != nullptr)
    row.words = (const uint32_t*)p.mask + b * size;
  if (!is_penalised(p, b))
    return row;
  if (p.mask != nullptr)
    std::memcpy(p.work.words, row.words, size * sizeof(uint32_t));
  else
    std::memset(p.work.words, 0xff, size * sizeof(uint32_t));
  num_penalised = penalise(p, b, p.work.words);
  row.words = p.work.words;
  return row;
}

constexpr int64_t kScanAhead = 2048; // bytes asked for ahead: out of the caches, 1.3 times as fast

// Fills the maximum of each block; returns that of the row, NaN where it holds one.
template <class T> KVKEYE_INLINE float scan(const Row<T>& row, float* peaks) {
  Vf top = splat(-INFINITY);
  Vi broken{};
  for (int64_t first = 0; first < row.size; first += kScanBlock) {
    Vf most = splat(-INFINITY);
    for (int64_t byte = 0; byte < kScanBlock * (int64_t)sizeof(T); byte += 64)
      __builtin_prefetch((const char*)(row.logits + first) + kScanAhead + byte);
    for_vectors(first, first + kScanBlock < row.size ? first + kScanBlock : row.size,
                [&](int64_t i, int lanes) KVKEYE_LAMBDA {
                  const Vf value = row.read(i, lanes);
                  broken |= value != value;
                  most = max(value, most);
                });
    top = max(most, top);
    peaks[first / kScanBlock] = largest(most);
  }
  bool is_broken = false;
  for (int lane = 0; lane < kLanes; ++lane)
    is_broken |= broken[lane] != 0;
  return is_broken ? NAN : largest(top);
}

// Visible tokens of at least `low`, which is finite, in their order.
template <class T>
KVKEYE_INLINE int64_t gather_from(const Row<T>& row, const float* peaks, float low, Candidate* c) {
  int64_t found = 0;
  for (int64_t first = 0; first < row.size; first += kScanBlock) {
    if (!(peaks[first / kScanBlock] >= low))
      continue;
    uint64_t reach = 0;
    for_vectors(first, first + kScanBlock < row.size ? first + kScanBlock : row.size,
                [&](int64_t i, int lanes)
                    KVKEYE_LAMBDA { reach |= (uint64_t)bits_from(row.read(i, lanes), low) << (i - first); });
    for (; reach != 0; reach &= reach - 1) {
      const int64_t i = first + __builtin_ctzll(reach);
      c[found++] = {value_of(row.logits[i]), (int32_t)i};
    }
  }
  return found;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
