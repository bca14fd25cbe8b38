// Draws in which the whole vocabulary takes part: all probabilities in fp64, in vectors.
//
// Truncation marks a dropped token with -inf. A histogram over the leading bits of the probabilities shows in
// which bucket a cut falls; only that one is ranked.
#pragma once

#include "kvkeye/common/simd_double.h"
#include "sampling_rank.h"
#include "sampling_scan.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr double kDropped = -INFINITY;
// Logits to probabilities, relative to that of the likeliest token, whose own is exactly 1.
struct Softmax {
  double inverse, offset; // of the temperature; what the peak becomes

  KVKEYE_INLINE Softmax of(double peak, double temperature) {
    const double inverse = 1.0 / temperature;
    return {inverse, peak * inverse};
  }
  // NaN gives 0: it comes of -inf over an infinite temperature.
  KVKEYE_LAMBDA Vd of(Vd logit) const { return exp(logit * inverse - offset); }
  KVKEYE_LAMBDA double of(double logit) const { return of(splat_double(logit))[0]; }
};

// Of the tokens from i on; 0 for what is hidden, and for lanes behind the last.
template <class T>
KVKEYE_INLINE void probabilities(const Row<T>& row, const Softmax& softmax, int64_t i, int lanes,
                                 Vd (&p)[2]) {
  widen(row.read(i, lanes), p);
  for (Vd& half : p)
    half = softmax.of(half);
}

// Of tokens [begin, end).
template <class T>
void fill_probabilities(const Row<T>& row, const Softmax& softmax, int64_t begin, int64_t end, double* out) {
  for_vectors(begin, end, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    Vd p[2];
    probabilities(row, softmax, i, lanes, p);
    std::memcpy(out + i - begin, p, lanes * sizeof(double));
  });
}

KVKEYE_INLINE double sum_of(Vd values) {
  double total = 0.0;
  for (int lane = 0; lane < kDoubles; ++lane)
    total += values[lane];
  return total;
}

// Top-p over `size` candidates and nothing else.
KVKEYE_INLINE void keep_share_in(double* row, Candidate* c, int64_t size, double share) {
  for (int64_t i = 0; i < size; ++i)
    row[c[i].id] = kDropped;
  const int64_t kept = keep_share(c, size, share);
  for (int64_t i = 0; i < kept; ++i)
    row[c[i].id] = c[i].value;
}

KVKEYE_INLINE void drop(double* row, const Candidate* c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    row[c[i].id] = kDropped;
}

// Buckets of falling probability: 64 per power of two from 1 down to 2^-64, the last one for all that is
// less.

constexpr int kBuckets = 4096;

struct Bucket {
  double mass;
  int64_t count;
};

KVKEYE_INLINE int bucket_of(double probability) {
  const double one = 1.0;
  int64_t bits, top;
  std::memcpy(&bits, &probability, sizeof bits);
  std::memcpy(&top, &one, sizeof top);
  const int64_t distance = (top >> 46) - (bits >> 46);
  return distance < 0 ? 0 : distance < kBuckets ? (int)distance : kBuckets - 1;
}

// The least probability of a bucket.
KVKEYE_INLINE double floor_of_bucket(int bucket) {
  const double one = 1.0;
  int64_t bits;
  std::memcpy(&bits, &one, sizeof bits);
  bits = ((bits >> 46) - bucket) * ((int64_t)1 << 46);
  double found;
  std::memcpy(&found, &bits, sizeof found);
  return found;
}

// Candidates whose bucket lies in [first, last].
KVKEYE_INLINE int64_t gather(const double* row, int64_t size, int first, int last, Candidate* c) {
  int64_t found = 0;
  for (int64_t i = 0; i < size; ++i) {
    c[found] = {row[i], (int32_t)i};
    const int bucket = bucket_of(row[i]);
    found += bucket >= first && bucket <= last;
  }
  return found;
}

KVKEYE_INLINE void drop_below(double* row, int64_t size, int bucket) {
  for (int64_t i = 0; i < size; ++i)
    row[i] = bucket_of(row[i]) > bucket ? kDropped : row[i];
}

void keep_first(double* row, Candidate* c, int64_t size, const Bucket* buckets, int64_t top_k, double top_p) {
  int bucket = 0;
  int64_t above = 0;
  for (; above + buckets[bucket].count < top_k; ++bucket)
    above += buckets[bucket].count;
  const bool share = top_p < 1.0; // needs all that is kept, ranked
  const int64_t found = gather(row, size, share ? 0 : bucket, bucket, c),
                kept = share ? top_k : top_k - above;
  drop_below(row, size, bucket);
  select<ByRank>(c, found, kept);
  drop(row, c, kept, found);
  if (share)
    keep_share_in(row, c, kept, top_p);
}

// Top-p over the whole vocabulary. The mass before a bucket is not summed in the order of rank, so a
// comparison closer than the rounding errors is left to keep_share.
void keep_share_of_all(double* row, Candidate* c, int64_t size, const Bucket* buckets, double share) {
  double total = 0.0, mass = 0.0;
  for (int i = 0; i < kBuckets; ++i)
    total += buckets[i].mass;
  const double doubt = 4.0 * 0x1p-52 * (double)size * total;
  bool first = true;
  for (int bucket = 0; bucket < kBuckets; ++bucket) {
    if (mass + buckets[bucket].mass < share * total - doubt) {
      mass += buckets[bucket].mass;
      first = first && buckets[bucket].count == 0;
      continue;
    }
    const int64_t found = gather(row, size, bucket, bucket, c);
    sort<ByRank>(c, found);
    for (int64_t i = 0; i < found; ++i, first = false) {
      const double distance = mass - share * total;
      if (!(fabs(distance) > doubt))
        return keep_share_in(row, c, gather(row, size, 0, kBuckets - 1, c), share);
      if (!first && distance > 0.0) {
        drop_below(row, size, bucket);
        return drop(row, c, i, found);
      }
      mass += c[i].value;
    }
  }
}

KVKEYE_INLINE void truncate(double* row, Candidate* c, int64_t size, int64_t top_k, double top_p) {
  const bool some = top_k > 0 && top_k < size;
  if (!some && !(top_p < 1.0))
    return;
  Bucket buckets[kBuckets] = {};
  for (int64_t i = 0; i < size; ++i) {
    Bucket& bucket = buckets[bucket_of(row[i])];
    bucket.mass += row[i];
    bucket.count += 1;
  }
  if (some)
    keep_first(row, c, size, buckets, top_k, top_p);
  else
    keep_share_of_all(row, c, size, buckets, top_p);
}

constexpr int64_t kMassBlock = 512; // tokens whose masses are added first

// The mass of [begin, end), without what lies below min_p.
KVKEYE_INLINE double mass_of(const double* row, int64_t begin, int64_t end, double min_p) {
  Vd sums[4] = {};
  int64_t i = begin;
  for (; i + 4 * kDoubles <= end; i += 4 * kDoubles)
    for (int part = 0; part < 4; ++part) {
      Vd value;
      std::memcpy(&value, row + i + part * kDoubles, sizeof value);
      sums[part] += value >= min_p ? value : Vd{};
    }
  double total = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < end; ++i)
    total += row[i] >= min_p ? row[i] : 0.0;
  return total;
}

// The first token whose cumulated mass exceeds u times the total; masses add up in blocks.
KVKEYE_INLINE int64_t invert(const double* row, int64_t size, double min_p, double u) {
  double total = 0.0, mass = 0.0;
  for (int64_t first = 0; first < size; first += kMassBlock)
    total += mass_of(row, first, first + kMassBlock < size ? first + kMassBlock : size, min_p);
  int64_t last = -1;
  for (int64_t first = 0; first < size; first += kMassBlock) {
    const int64_t end = first + kMassBlock < size ? first + kMassBlock : size;
    const double block = mass_of(row, first, end, min_p);
    const bool is_inside = mass + block > u * total;
    double inner = mass;
    for (int64_t i = first; block > 0.0 && (is_inside || end == size) && i < end; ++i) {
      if (!(row[i] >= min_p && row[i] > 0.0))
        continue;
      inner += row[i];
      last = i;
      if (is_inside && inner > u * total)
        return i;
    }
    if (is_inside) // by the order of the sums only
      return last;
    mass += block;
  }
  return last;
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
