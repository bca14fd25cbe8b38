// Drawing the next token without sorting the vocabulary.
//
// Truncation marks a dropped token with probability -inf. Ranks order by probability and, on ties, by id. A
// histogram over the leading bits of the probabilities shows in which bucket a cut falls; only that one is
// ranked.
#include "kvkeye/sampling.h"
#include "kvkeye/common/philox.h"
#include "kvkeye/common/simd.h"

#include <math.h>

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr double kDropped = -INFINITY;

// Selection and sorting.

KVKEYE_INLINE bool before(const Candidate& a, const Candidate& b) {
  return a.probability > b.probability || (a.probability == b.probability && a.id < b.id);
}

KVKEYE_INLINE void exchange(Candidate& a, Candidate& b) {
  const Candidate c = a;
  a = b;
  b = c;
}

void insertion_sort(Candidate* c, int64_t size) {
  for (int64_t i = 1; i < size; ++i) {
    const Candidate moved = c[i];
    int64_t j = i;
    for (; j > 0 && before(moved, c[j - 1]); --j)
      c[j] = c[j - 1];
    c[j] = moved;
  }
}

// Hoare's partition around the median of three: all of [0, result) rank before all of [result, size).
int64_t partition(Candidate* c, int64_t size) {
  Candidate &low = c[0], &middle = c[size / 2], &high = c[size - 1];
  if (before(middle, low))
    exchange(middle, low);
  if (before(high, middle))
    exchange(high, middle);
  if (before(middle, low))
    exchange(middle, low);
  const Candidate pivot = middle;
  int64_t i = 0, j = size - 1;
  for (;;) {
    while (before(c[i], pivot))
      ++i;
    while (before(pivot, c[j]))
      --j;
    if (i >= j)
      return j + 1;
    exchange(c[i++], c[j--]);
  }
}

constexpr int64_t kSmall = 16;

// The first `count` in rank, in no order, come first.
void select(Candidate* c, int64_t size, int64_t count) {
  while (size > kSmall && count > 0 && count < size) {
    const int64_t split = partition(c, size);
    if (count <= split) {
      size = split;
    } else {
      c += split;
      size -= split;
      count -= split;
    }
  }
  insertion_sort(c, size <= kSmall ? size : 0);
}

void sort(Candidate* c, int64_t size) {
  while (size > kSmall) {
    const int64_t split = partition(c, size);
    const bool left_smaller = split < size - split;
    sort(left_smaller ? c : c + split, left_smaller ? split : size - split);
    c = left_smaller ? c + split : c;
    size = left_smaller ? size - split : split;
  }
  insertion_sort(c, size);
}

// One row.

KVKEYE_INLINE double value_of(float x) {
  return x;
}
KVKEYE_INLINE double value_of(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T> void load_logits(const SampleParams<T>& p, int64_t b) {
  const T* logits = p.logits + b * p.logits_stride;
  const int32_t* allowed = p.mask == nullptr ? nullptr : p.mask + b * ((p.vocabulary + 31) / 32);
  for (int64_t i = 0; i < p.vocabulary; ++i) {
    const bool hidden = allowed != nullptr && ((uint32_t)allowed[i / 32] >> (i % 32) & 1u) == 0;
    p.row[i] = hidden ? -INFINITY : value_of(logits[i]);
  }
}

template <class T> void penalise(const SampleParams<T>& p, int64_t b) {
  const int64_t first = p.cu_history[b], end = p.cu_history[b + 1];
  const double repetition = p.repetition[b], presence = p.presence[b], frequency = p.frequency[b];
  // One more than the occurrences in the output; 0 for a token never seen.
  for (int64_t i = first; i < end; ++i) {
    int32_t& count = p.counts[p.history[i]];
    count += (count == 0) + (i - first >= p.num_prompt[b]);
  }
  for (int64_t i = first; i < end; ++i) {
    int32_t& count = p.counts[p.history[i]];
    double& value = p.row[p.history[i]];
    if (count > 0 && repetition != 1.0)
      value = value > 0.0 ? value / repetition : value * repetition;
    if (count > 1 && (presence != 0.0 || frequency != 0.0))
      value = value - frequency * (double)(count - 1) - presence;
    count = 0;
  }
}

// The largest value, NaN if there is one.
KVKEYE_INLINE double peak_of(const double* row, int64_t size) {
  double peak = -INFINITY;
  bool broken = false;
  for (int64_t i = 0; i < size; ++i) {
    broken |= row[i] != row[i];
    peak = row[i] > peak ? row[i] : peak;
  }
  return broken ? NAN : peak;
}

KVKEYE_INLINE void drop(double* row, const Candidate* c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    row[c[i].id] = kDropped;
}

// Top-p over `size` ranked candidates as it is defined: a token stays if the mass before it is below the
// share.
void keep_share(double* row, Candidate* c, int64_t size, double share) {
  sort(c, size);
  double total = 0.0, mass = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += c[i].probability;
  for (int64_t i = 0; i < size; ++i) {
    mass += c[i].probability;
    if (i > 0 && !(mass - c[i].probability < share * total))
      row[c[i].id] = kDropped;
  }
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
  select(c, found, kept);
  drop(row, c, kept, found);
  if (share)
    keep_share(row, c, kept, top_p);
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
    sort(c, found);
    for (int64_t i = 0; i < found; ++i, first = false) {
      const double distance = mass - share * total;
      if (!(fabs(distance) > doubt))
        return keep_share(row, c, gather(row, size, 0, kBuckets - 1, c), share);
      if (!first && distance > 0.0) {
        drop_below(row, size, bucket);
        return drop(row, c, i, found);
      }
      mass += c[i].probability;
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

// The first token whose cumulated mass exceeds u times the total.
KVKEYE_INLINE int64_t invert(const double* row, int64_t size, double min_p, double u) {
  double total = 0.0, mass = 0.0;
  int64_t last = -1;
  for (int64_t i = 0; i < size; ++i)
    if (row[i] >= min_p) {
      total += row[i];
      last = i;
    }
  for (int64_t i = 0; i < last; ++i) {
    if (row[i] >= min_p)
      mass += row[i];
    if (mass > u * total)
      return i;
  }
  return last;
}

// Speculative sampling: the accepted proposal, or a draw from what the proposals leave over. Exact for any
// `probability`. Afterwards `row` holds the leftover.

KVKEYE_INLINE double kept_mass(const double* row, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += row[i] > 0.0 ? row[i] : 0.0;
  return total;
}

// Whether a token is among the first `count` proposals.
KVKEYE_INLINE bool was_proposed(const Drafts& drafts, int count, int64_t token) {
  bool found = false;
  for (int i = 0; i < count; ++i)
    found = found || drafts.tokens[i] == token;
  return found;
}

// The mass of all but the first `count` proposals.
KVKEYE_INLINE double draft_mass(const Drafts& drafts, int count, int64_t size) {
  double total = 0.0;
  for (int64_t i = 0; i < size; ++i)
    total += was_proposed(drafts, count, i) ? 0.0 : (double)drafts.probability[i];
  return total;
}

int64_t accept(double* row, int64_t size, double min_p, const Drafts& drafts, int64_t seed, int64_t position,
               int64_t sample_index) {
  for (int64_t i = 0; i < size; ++i)
    row[i] = row[i] >= min_p && row[i] > 0.0 ? row[i] : kDropped;
  for (int sibling = 0; sibling < drafts.count; ++sibling) {
    const int64_t token = drafts.tokens[sibling];
    const double mass = kept_mass(row, size), draft = draft_mass(drafts, sibling, size);
    if (!(drafts.probability[token] > 0.0f && draft > 0.0) || was_proposed(drafts, sibling, token))
      continue; // not a draw from what was left
    const double u = philox_uniform(seed, position, accept_draw(sibling), sample_index);
    if (u * (drafts.probability[token] / draft) < row[token] / mass)
      return token;
    double left = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      const double rest = row[i] / mass - drafts.probability[i] / draft;
      row[i] = rest > 0.0 ? rest : kDropped;
      left += rest > 0.0 ? rest : 0.0;
    }
    if (!(left > 0.0)) // only rounding kept it from being accepted
      return token;
  }
  return invert(row, size, 0.0, philox_uniform(seed, position, Draw::sample, sample_index));
}

template <class T> int64_t draw(const SampleParams<T>& p, int64_t b) {
  load_logits(p, b);
  penalise(p, b);
  const double peak = peak_of(p.row, p.vocabulary), temperature = p.temperature[b];
  if (!(fabs(peak) < INFINITY) || temperature != temperature)
    return -1;
  if (temperature == 0.0) {
    int64_t first = 0;
    while (p.row[first] != peak)
      ++first;
    return first;
  }
  const double offset = peak / temperature;
  for (int64_t i = 0; i < p.vocabulary; ++i) {
    const double probability = ::exp(p.row[i] / temperature - offset);
    p.row[i] = probability == probability ? probability : 0.0; // -inf over an infinite temperature
  }
  truncate(p.row, p.candidates, p.vocabulary, p.top_k[b], p.top_p[b]);
  if (p.drafts.probability != nullptr)
    return accept(p.row, p.vocabulary, p.min_p[b], p.drafts, p.seeds[b], p.positions[b], p.sample_index[b]);
  const double u = philox_uniform(p.seeds[b], p.positions[b], Draw::sample, p.sample_index[b]);
  return invert(p.row, p.vocabulary, p.min_p[b], u);
}

} // namespace

template <class T> void sample(const SampleParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    p.tokens[b] = draw(p, b);
}

KVKEYE_INSTANTIATE(sample, SampleParams)

} // namespace kvkeye::KVKEYE_ISA
