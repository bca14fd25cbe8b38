// Top-k and top-p without sorting the vocabulary: where in the order of rank the kept tokens end.
#pragma once

#include "sampling_row.h"

namespace kvkeye::cuda {

constexpr int kBuckets = 4096, kKeys = kBuckets << 12;
// Masses in buckets are whole numbers, whose sum has no order: parts of the largest probability in question.
constexpr double kMassUnit = 0x1p-43;

struct Histogram {
  unsigned long long mass[kBuckets];
  uint32_t count[kBuckets];
};

// Tokens up to here in the order of rank: by key, then by probability and id; where `by_id`, tokens of one
// key rank by id alone.
struct Cut {
  int key;
  double probability;
  int id;
  bool by_id;

  __device__ bool keeps(int k, double other, int i) const {
    if (k != key)
      return k < key;
    return by_id ? i <= id : other > probability || (other == probability && i <= id);
  }
};

// Keeps everything.
__device__ __forceinline__ Cut whole_row() {
  return {kKeys, 0.0, 0, false};
}

// How far to go: the first `count` tokens, or until the mass before a token reaches `mass`.
struct Goal {
  bool by_count;
  int count;
  double mass;

  // Whether a token with so much before it is still wanted.
  __device__ bool wants(int count_before, double mass_before) const {
    return by_count ? count_before < count : mass_before < mass || count_before == 0;
  }
};

// What lies before a bucket, and the bucket.
struct Found {
  int bucket, count_before, count;
  double mass_before, mass;
};

struct CutMemory {
  union {
    Histogram histogram;
    Candidates candidates;
    double pieces[kPieces];
  };
  BlockScratch scratch;
  Found found;
  int gathered;
};

__device__ inline void clear(Histogram& histogram) {
  for (int i = (int)threadIdx.x; i < kBuckets; i += kBlockThreads) {
    histogram.mass[i] = 0;
    histogram.count[i] = 0;
  }
  __syncthreads();
}

// The bucket in which the goal is met, the last one with tokens if none. `largest` is the probability that
// the units of mass are parts of; `start` is what lies before the first bucket. All threads learn it.
__device__ inline Found find_bucket(CutMemory& memory, const Goal& goal, const Found& start, double largest) {
  constexpr int kEach = kBuckets / kBlockThreads;
  const Histogram& histogram = memory.histogram;
  const int first = (int)threadIdx.x * kEach;
  double count = 0.0, mass = 0.0;
  for (int i = first; i < first + kEach; ++i) {
    count += histogram.count[i];
    mass += (double)histogram.mass[i] * kMassUnit * largest;
  }
  const Scanned counts = block_scan(memory.scratch, count), masses = block_scan(memory.scratch, mass);
  Found mine{-1, start.count_before + (int)(counts.upto - count), 0, start.mass_before + masses.upto - mass,
             0.0};
  int last = -1; // the last bucket of this thread whose first token is wanted
  Found at = mine;
  for (int i = first; i < first + kEach; ++i) {
    mine.count = (int)histogram.count[i];
    mine.mass = (double)histogram.mass[i] * kMassUnit * largest;
    if (mine.count != 0 && goal.wants(mine.count_before, mine.mass_before)) {
      last = mine.bucket = i;
      at = mine;
    }
    mine.count_before += mine.count;
    mine.mass_before += mine.mass;
  }
  const int bucket = block_max(memory.scratch, last);
  if (last == bucket && last >= 0)
    memory.found = at;
  __syncthreads();
  return memory.found;
}

// body(token, value, key) of the tokens that `cut` keeps.
template <class T, class Body> __device__ void for_kept(const Row<T>& row, const Cut& cut, Body body) {
  row.for_tokens([&](int i, double value) {
    const int key = row.key(value);
    if (key < cut.key || (key == cut.key && cut.keeps(key, row.probability(value), i)))
      body(i, value, key);
  });
}

__device__ __forceinline__ void add(Histogram& histogram, int bucket, double share) {
  atomicAdd(&histogram.count[bucket], 1u);
  atomicAdd(&histogram.mass[bucket], (unsigned long long)(share / kMassUnit));
}

// A number of tokens wanted among equals: the goal's share of a bucket whose tokens weigh alike.
__device__ inline int wanted_of(const Goal& goal, const Found& bucket, double each) {
  int low = 0, high = bucket.count; // tokens [0, low) are wanted, [high, ...) are not
  while (low < high) {
    const int middle = (low + high) / 2;
    if (goal.wants(bucket.count_before + middle, bucket.mass_before + middle * each))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The first tokens in id among those of `key`, which are more than a block can sort.
template <class T>
__device__ Cut cut_by_id(const Row<T>& row, CutMemory& memory, const Cut& within, int key, int wanted) {
  if (wanted == 0)
    return {key, 0.0, -1, true};
  static_assert(kPieces <= kBuckets, "a count for every piece");
  clear(memory.histogram);
  for_kept(row, within, [&](int i, double, int k) {
    if (k == key)
      atomicAdd(&memory.histogram.count[i / kPiece], 1u);
  });
  __syncthreads();
  const Found piece = find_bucket(memory, {true, wanted, 0.0}, {}, 0.0);
  if (threadIdx.x == 0)
    memory.gathered = 0;
  if (threadIdx.x < kPiece)
    memory.candidates.id[threadIdx.x] = 0x7fffffff;
  __syncthreads();
  for_kept(row, within, [&](int i, double, int k) {
    if (k == key && i / kPiece == piece.bucket)
      memory.candidates.id[atomicAdd(&memory.gathered, 1)] = i;
  });
  block_sort<true>(memory.candidates, kPiece);
  const Cut cut{key, 0.0, memory.candidates.id[wanted - piece.count_before - 1], true};
  __syncthreads(); // the candidates are read
  return cut;
}

// The tokens of wanted keys that `within` keeps as candidates, ranked. At most as many as threads.
template <class T, class Wanted>
__device__ int gather(const Row<T>& row, CutMemory& memory, const Cut& within, Wanted wanted) {
  if (threadIdx.x == 0)
    memory.gathered = 0;
  memory.candidates.probability[threadIdx.x] = -1.0;
  memory.candidates.id[threadIdx.x] = 0x7fffffff;
  __syncthreads();
  for_kept(row, within, [&](int i, double value, int key) {
    if (!wanted(key))
      return;
    const int place = atomicAdd(&memory.gathered, 1);
    memory.candidates.probability[place] = row.probability(value);
    memory.candidates.id[place] = i;
  });
  __syncthreads();
  int size = 2;
  while (size < memory.gathered)
    size *= 2;
  block_sort<false>(memory.candidates, size);
  return memory.gathered;
}

// The cut within one key's tokens.
template <class T>
__device__ Cut cut_in_key(const Row<T>& row, CutMemory& memory, const Cut& within, int key, const Goal& goal,
                          const Found& tokens) {
  if (tokens.count > kBlockThreads)
    return cut_by_id(row, memory, within, key, wanted_of(goal, tokens, tokens.mass / tokens.count));
  const int size = gather(row, memory, within, [=](int k) { return k == key; });
  const int i = (int)threadIdx.x;
  const double mine = i < size ? memory.candidates.probability[i] : 0.0;
  const Scanned masses = block_scan(memory.scratch, mine);
  const bool wanted =
      i < size && goal.wants(tokens.count_before + i, tokens.mass_before + masses.upto - mine);
  const int last = block_max(memory.scratch, wanted ? i : -1);
  if (last < 0)
    return {key, INFINITY, -1, false};
  const Cut cut{key, memory.candidates.probability[last], memory.candidates.id[last], false};
  __syncthreads(); // the candidates are read
  return cut;
}

// The mass of the tokens that `cut` keeps and whose key lies below `end`.
template <class T> __device__ double mass_of(const Row<T>& row, CutMemory& memory, const Cut& cut, int end) {
  double mass = 0.0;
  for_kept(row, cut, [&](int, double value, int key) { mass += key < end ? row.probability(value) : 0.0; });
  return block_sum(memory.scratch, mass);
}

// The first step: in which of 4096 buckets the goal is met.
template <class T>
__device__ Found find_first(const Row<T>& row, CutMemory& memory, const Cut& within, const Goal& goal) {
  clear(memory.histogram);
  for_kept(row, within, [&](int, double value, int key) {
    add(memory.histogram, key >> 12, goal.by_count ? 0.0 : row.probability(value));
  });
  __syncthreads();
  return find_bucket(memory, goal, {}, 1.0);
}

// The rest: in which of its keys, and at which token. Sums that decide are in fp64 and in one order.
template <class T>
__device__ Cut find_cut(const Row<T>& row, CutMemory& memory, const Cut& within, const Goal& goal,
                        Found bucket) {
  const double largest = exp2(-bucket.bucket / 64.0);
  if (!goal.by_count)
    bucket.mass_before = mass_of(row, memory, within, bucket.bucket << 12);
  clear(memory.histogram);
  for_kept(row, within, [&](int, double value, int key) {
    if (key >> 12 == bucket.bucket)
      add(memory.histogram, key & 4095, goal.by_count ? 0.0 : row.probability(value) / largest);
  });
  __syncthreads();
  Found tokens = find_bucket(memory, goal, bucket, largest);
  const int key = bucket.bucket << 12 | tokens.bucket;
  if (!goal.by_count)
    tokens.mass_before = mass_of(row, memory, within, key);
  return cut_in_key(row, memory, within, key, goal, tokens);
}

} // namespace kvkeye::cuda
