// One draw by a block of threads. The usual nucleus of at most 512 tokens is found in three walks over the
// logits and finished in shared memory; a wider one is cut in the vocabulary itself.
#pragma once

#include "kvkeye/common/philox.h"

#include "sampling_cut.h"

namespace kvkeye::cuda {

// What is left of a row after the walk for its peak.
struct Settings {
  bool limited, shared; // top-k, top-p
  int top_k;
  double top_p, min_p, u;
};

template <class T> __device__ double uniform(const Row<T>& row, Draw kind) {
  const int64_t request = row.place.request;
  return philox_uniform(row.p.seeds[request], row.p.positions[request] + row.place.depth, kind,
                        row.p.sample_index[request]);
}

template <class T> __device__ Settings settings_of(const Row<T>& row) {
  const SampleCudaParams<T>& p = row.p;
  const int64_t request = row.place.request;
  return {p.top_k[request] > 0 && p.top_k[request] < p.vocabulary,
          p.top_p[request] < 1.0f,
          p.top_k[request],
          p.top_p[request],
          p.min_p[request],
          uniform(row, Draw::sample)};
}

// What a token weighs in the draw: its probability where it is kept, else 0.
template <class T> struct Weight {
  const Row<T>& row;
  Cut cut;
  double min_p;

  __device__ double operator()(int i, double value) const {
    const double probability = row.probability(value);
    return probability >= min_p && cut.keeps(row.key(value), probability, i) ? probability : 0.0;
  }
};

// The first thread for which it is true, or kBlockThreads.
__device__ inline int first_thread(BlockScratch& scratch, bool condition) {
  const int i = (int)threadIdx.x;
  return kBlockThreads - 1 - block_max(scratch, condition ? kBlockThreads - 1 - i : -1);
}

// From ranked candidates that hold everything kept. `total` is the whole row's mass, for top-p without top-k.
__device__ inline int64_t draw_from_candidates(CutMemory& memory, const Settings& given, int size,
                                               double total) {
  Candidates& candidates = memory.candidates;
  const int i = (int)threadIdx.x;
  const double mine = i < size ? candidates.probability[i] : 0.0;
  bool kept = i < (given.limited ? min(given.top_k, size) : size);
  if (given.shared) {
    const Scanned masses = block_scan(memory.scratch, kept ? mine : 0.0);
    kept = kept && (i == 0 || masses.upto - mine < given.top_p * (given.limited ? masses.all : total));
  }
  kept = kept && mine >= given.min_p;
  if (!kept) {
    candidates.probability[i] = 0.0;
    candidates.id[i] = 0x7fffffff;
  }
  int slots = 2;
  while (slots < size)
    slots *= 2;
  block_sort<true>(candidates, slots);
  const int count = __syncthreads_count(kept); // redundant: wanted for its value; block_sort has waited
  const Scanned masses = block_scan(memory.scratch, i < count ? candidates.probability[i] : 0.0);
  const int chosen = first_thread(memory.scratch, i < count && masses.upto > given.u * masses.all);
  return candidates.id[min(chosen, count - 1)];
}

// The first token of the piece at which the mass exceeds the target, or the last one kept there.
template <class T, class Weigh>
__device__ int token_in_piece(const Row<T>& row, const Weigh& weight, const Found& piece, double target) {
  const int first = piece.bucket * kPiece;
  if (row.penalised)
    row.count(first / kSliceTokens * kSliceTokens);
  if (warp_index() != 0)
    return -1;
  double mass = piece.mass_before;
  int last = -1;
  for (int start = first; start < min(first + kPiece, row.p.vocabulary); start += 32) {
    const int i = start + lane_index();
    const double mine = i < row.p.vocabulary ? weight(i, row.value(i)) : 0.0;
    const bool kept = mine > 0.0;
    const double upto = mass + warp_scan(mine);
    const unsigned over = __ballot_sync(kAllLanes, kept && upto > target);
    if (over != 0)
      return start + __ffs((int)over) - 1;
    const unsigned some = __ballot_sync(kAllLanes, kept);
    last = some != 0 ? start + 31 - __clz((int)some) : last;
    mass = __shfl_sync(kAllLanes, upto, 31);
  }
  return last;
}

// From all tokens that weigh something, in the order of the vocabulary.
template <class T, class Weigh>
__device__ int64_t draw_from_row(const Row<T>& row, CutMemory& memory, const Weigh& weight, double u) {
  constexpr int kEach = kPieces / kBlockThreads;
  for (int i = (int)threadIdx.x; i < kPieces; i += kBlockThreads)
    memory.pieces[i] = 0.0;
  __syncthreads();
  double mine = 0.0;
  int last = -1;
  row.for_pieces(
      [&](int i, double value) {
        const double found = weight(i, value);
        mine += found;
        last = found > 0.0 ? i : last;
      },
      [&](int piece) {
        const double sum = warp_sum(mine);
        if (lane_index() == 0)
          memory.pieces[piece] = sum;
        mine = 0.0;
      });
  last = block_max(memory.scratch, last);
  const int first = (int)threadIdx.x * kEach;
  double sum = 0.0;
  for (int i = first; i < first + kEach; ++i)
    sum += memory.pieces[i];
  const Scanned masses = block_scan(memory.scratch, sum);
  const double target = u * masses.all;
  Found at{-1, 0, 0, masses.upto - sum, 0.0};
  for (int i = first; i < first + kEach && at.bucket < 0; ++i) {
    if (at.mass_before + memory.pieces[i] > target)
      at.bucket = i;
    else
      at.mass_before += memory.pieces[i];
  }
  const int chosen = first_thread(memory.scratch, at.bucket >= 0);
  if (chosen == kBlockThreads)
    return last;
  if ((int)threadIdx.x == chosen)
    memory.found = at;
  __syncthreads();
  const int token = token_in_piece(row, weight, memory.found, target);
  return token >= 0 ? token : last;
}

// -2 if a draw is needed. Finds the peak on the way.
template <class T> __device__ int64_t without_draw(Row<T>& row, BlockScratch& scratch) {
  Best best{-INFINITY, 0x7fffffff};
  bool broken = false;
  row.for_tokens([&](int i, double value) {
    broken = broken || value != value;
    best = better(best, {value, i});
  });
  const bool any_broken = __syncthreads_or(broken) != 0; // redundant: wanted for its value; block_best waits
  best = block_best(scratch, best);
  const float temperature = row.p.temperature[row.place.request];
  if (any_broken || !(fabs(best.value) < INFINITY) || temperature != temperature)
    return -1;
  row.set_peak(best.value);
  return temperature == 0.0f ? best.id : -2;
}

// The whole row's mass decides top-p where top-k does not come first.
template <class T> __device__ double total_of(const Row<T>& row, CutMemory& memory, const Settings& given) {
  return given.limited ? 0.0 : mass_of(row, memory, whole_row(), kKeys);
}

__device__ inline Goal goal_of(const Settings& given, double total) {
  return {given.limited, given.top_k, given.top_p * total};
}

// Where top-k and top-p end; `bucket` is where the goal is met.
template <class T>
__device__ Cut cut_of(const Row<T>& row, CutMemory& memory, const Settings& given, const Goal& goal,
                      const Found& bucket) {
  const Cut cut = find_cut(row, memory, whole_row(), goal, bucket);
  if (!given.limited || !given.shared)
    return cut;
  const Goal share{false, 0, given.top_p * mass_of(row, memory, cut, kKeys)};
  return find_cut(row, memory, cut, share, find_first(row, memory, cut, share));
}

template <class T> __device__ int64_t draw(Row<T>& row, CutMemory& memory) {
  const int64_t token = without_draw(row, memory.scratch);
  if (token != -2)
    return token;
  const Settings given = settings_of(row);
  if (!given.limited && !given.shared)
    return draw_from_row(row, memory, Weight<T>{row, whole_row(), given.min_p}, given.u);
  const double total = total_of(row, memory, given);
  const Goal goal = goal_of(given, total);
  const Found bucket = find_first(row, memory, whole_row(), goal);
  if (bucket.count_before + bucket.count <= kBlockThreads) {
    const int size = gather(row, memory, whole_row(), [&](int key) { return key >> 12 <= bucket.bucket; });
    return draw_from_candidates(memory, given, size, total);
  }
  const Cut cut = cut_of(row, memory, given, goal, bucket);
  return draw_from_row(row, memory, Weight<T>{row, cut, given.min_p}, given.u);
}

} // namespace kvkeye::cuda
