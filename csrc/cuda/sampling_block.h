// What all threads of a block find out together: sums, maxima, scans and sorts in one fixed order.
#pragma once

#include "device.h"

namespace kvkeye::cuda {

constexpr int kBlockThreads = 512, kBlockWarps = kBlockThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() {
  return (int)threadIdx.x % 32;
}
__device__ __forceinline__ int warp_index() {
  return (int)threadIdx.x / 32;
}

// One value per warp, and a place to hand out a result.
struct BlockScratch {
  double sums[kBlockWarps];
  int numbers[kBlockWarps];
};

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

// The sum of the lanes up to the own one.
template <class V> __device__ __forceinline__ V warp_scan(V value) {
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const V before = __shfl_up_sync(kAllLanes, value, (unsigned)delta);
    value += lane_index() >= delta ? before : V(0);
  }
  return value;
}

// Every thread's sum of the threads up to itself, and of all.
struct Scanned {
  double upto, all;
};

__device__ inline Scanned block_scan(BlockScratch& scratch, double value) {
  const double inside = warp_scan(value);
  if (lane_index() == 31)
    scratch.sums[warp_index()] = inside;
  __syncthreads();
  const double ends = warp_scan(lane_index() < kBlockWarps ? scratch.sums[lane_index()] : 0.0);
  const double before = __shfl_sync(kAllLanes, ends, (warp_index() + 31) % 32);
  const Scanned found{(warp_index() > 0 ? before : 0.0) + inside, __shfl_sync(kAllLanes, ends, 31)};
  __syncthreads(); // the scratch is free again
  return found;
}

__device__ inline double block_sum(BlockScratch& scratch, double value) {
  return block_scan(scratch, value).all;
}

__device__ inline int block_max(BlockScratch& scratch, int value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    value = max(value, __shfl_xor_sync(kAllLanes, value, bits));
  if (lane_index() == 0)
    scratch.numbers[warp_index()] = value;
  __syncthreads();
  value = scratch.numbers[lane_index() % kBlockWarps];
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    value = max(value, __shfl_xor_sync(kAllLanes, value, bits));
  __syncthreads(); // redundant: every caller so far waits once more before it asks again
  return value;
}

// The larger value, on ties the lower id.
struct Best {
  double value;
  int id;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2)
    best = better(best,
                  {__shfl_xor_sync(kAllLanes, best.value, bits), __shfl_xor_sync(kAllLanes, best.id, bits)});
  return best;
}

__device__ inline Best block_best(BlockScratch& scratch, Best best) {
  best = warp_best(best);
  if (lane_index() == 0) {
    scratch.sums[warp_index()] = best.value;
    scratch.numbers[warp_index()] = best.id;
  }
  __syncthreads();
  best = warp_best({scratch.sums[lane_index() % kBlockWarps], scratch.numbers[lane_index() % kBlockWarps]});
  __syncthreads(); // the scratch is free again
  return best;
}

// Tokens with their probabilities, one per thread.
struct Candidates {
  double probability[kBlockThreads];
  int id[kBlockThreads];
};

// Whether candidate i stands before candidate j: by falling probability, then by id; or by id alone.
template <bool ById> __device__ __forceinline__ bool before(const Candidates& c, int i, int j) {
  if (ById || c.probability[i] == c.probability[j])
    return c.id[i] < c.id[j];
  return c.probability[i] > c.probability[j];
}

// A bitonic network over the first `size` candidates, a power of two.
template <bool ById> __device__ void block_sort(Candidates& c, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      __syncthreads();
      const int i = (int)threadIdx.x, j = i ^ stride;
      if (i < size && j > i && before<ById>(c, j, i) == ((i & run) == 0)) {
        const double probability = c.probability[i];
        const int id = c.id[i];
        c.probability[i] = c.probability[j];
        c.id[i] = c.id[j];
        c.probability[j] = probability;
        c.id[j] = id;
      }
    }
  }
  __syncthreads();
}

} // namespace kvkeye::cuda
