// Checking proposed tokens: what would be drawn at a row follows from the row and its ancestors, so all rows
// are drawn side by side, one block of threads each; a warp per tree then walks from the root.
#include "sampling_accept.h"

namespace kvkeye::cuda {
namespace {

// What the draw at one row needs of its tree.
struct Branch {
  int parents[kCudaTreeRows], proposed[kCudaTreeRows];
  int path[kCudaTreeRows]; // proposals from below the root to the row
  int depth;
};

struct Shared {
  Counts counts;
  CutMemory cut;
  Branch branch;
  Offers offers;
};

struct Tree {
  int first, size;
};

// The tree of a row, found by bisection: the grid follows from the shapes.
template <class T> __device__ int tree_of(const VerifyDraftCudaParams<T>& p, int row) {
  int low = 0, high = (int)p.trees - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.cu_rows[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T> __device__ Tree bounds_of(const VerifyDraftCudaParams<T>& p, int tree) {
  const Tree found{p.cu_rows[tree], p.cu_rows[tree + 1] - p.cu_rows[tree]};
  if (found.first < 0 || found.size < 0 || found.size > kCudaTreeRows ||
      found.first + found.size > p.sample.rows)
    __trap();
  return found;
}

template <class T>
__device__ void read_branch(const VerifyDraftCudaParams<T>& p, const Tree& tree, int row, Branch& branch) {
  const int i = (int)threadIdx.x;
  if (row < 0 || row >= tree.size)
    __trap();
  if (i < tree.size) {
    const int parent = p.tree_parents[tree.first + i];
    const int64_t token = i > 0 ? p.draft_tokens[tree.first + i] : 0;
    if ((i == 0 ? parent != -1 : parent < 0 || parent >= i) || token < 0 || token >= p.sample.vocabulary)
      __trap();
    branch.parents[i] = parent;
    branch.proposed[i] = (int)token;
  }
  __syncthreads();
  if (i == 0) {
    int depth = 0;
    for (int at = row; at > 0; at = branch.parents[at])
      ++depth;
    branch.depth = depth;
    for (int at = row; at > 0; at = branch.parents[at])
      branch.path[--depth] = branch.proposed[at];
  }
  __syncthreads();
}

// Behind the next barrier all threads see them.
__device__ void find_offers(const Branch& branch, int row, int size, Offers& offers) {
  if (threadIdx.x == 0) {
    int count = 0;
    for (int child = row + 1; child < size; ++child)
      if (branch.parents[child] == row)
        offers.tokens[count++] = branch.proposed[child];
    offers.count = count;
  }
}

// Offered: a row's children were drawn from draft_probs.
template <class T, bool Offered>
__global__ void __launch_bounds__(kBlockThreads, 1)
    verify_rows_kernel(const __grid_constant__ VerifyDraftCudaParams<T> p) {
  Shared& shared = shared_memory<Shared>();
  const int at = (int)blockIdx.x, request = tree_of(p, at);
  const Tree tree = bounds_of(p, request);
  read_branch(p, tree, at - tree.first, shared.branch);
  Row<T> row(p.sample, shared.counts, {at, request, shared.branch.path, shared.branch.depth});
  int64_t token;
  if constexpr (Offered) {
    find_offers(shared.branch, at - tree.first, tree.size, shared.offers);
    const float* probability = p.draft_probs + (int64_t)at * p.sample.vocabulary;
    token = draw_after_offers(row, shared.cut, shared.offers, probability);
  } else {
    token = draw(row, shared.cut);
  }
  if (threadIdx.x == 0)
    p.sample.tokens[at] = token;
}

// A lane has rows `lane` and `lane` + 32 of the tree.
constexpr int kHalves = kCudaTreeRows / 32;

template <class T> __global__ void walk_trees_kernel(const __grid_constant__ VerifyDraftCudaParams<T> p) {
  const int request = (int)blockIdx.x, lane = lane_index();
  const Tree tree = bounds_of(p, request);
  if (p.cu_rows[0] != 0 || p.cu_rows[p.trees] != p.sample.rows)
    __trap();
  int parent[kHalves], proposed[kHalves], drawn[kHalves];
  int64_t token[kHalves], from[kHalves]; // of the outputs
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int row = lane + 32 * half;
    const bool inside = row < tree.size;
    parent[half] = inside ? p.tree_parents[tree.first + row] : -1;
    proposed[half] = inside ? (int)p.draft_tokens[tree.first + row] : -1;
    drawn[half] = inside ? (int)p.sample.tokens[tree.first + row] : -1;
    token[half] = from[half] = -1;
  }
  int count = 0;
  for (int row = tree.size > 0 ? 0 : -1; row >= 0; ++count) {
    int found = -1, next = -1;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const int other = __shfl_sync(kAllLanes, drawn[half], row % 32);
      found = row / 32 == half ? other : found;
    }
#pragma unroll
    for (int half = kHalves - 1; half >= 0; --half) {
      const unsigned follow = __ballot_sync(kAllLanes, parent[half] == row && proposed[half] == found);
      next = follow != 0 ? 32 * half + __ffs((int)follow) - 1 : next;
      if (lane + 32 * half == count) {
        token[half] = found;
        from[half] = tree.first + row;
      }
    }
    row = next;
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half)
    if (lane + 32 * half < tree.size) {
      p.sample.tokens[tree.first + lane + 32 * half] = token[half];
      p.rows[tree.first + lane + 32 * half] = from[half];
    }
  if (lane == 0)
    p.counts[request] = count;
}

} // namespace

template <class T> int verify_draft(const VerifyDraftCudaParams<T>& p, void* stream) {
  if (p.trees == 0)
    return cudaSuccess;
  if (p.sample.vocabulary > kCudaMostTokens)
    return cudaErrorInvalidValue;
  const dim3 rows((unsigned)p.sample.rows), threads(kBlockThreads);
  int status = cudaSuccess;
  if (p.sample.rows > 0)
    status = p.draft_probs == nullptr
                 ? launch<verify_rows_kernel<T, false>>(rows, threads, sizeof(Shared), stream, p)
                 : launch<verify_rows_kernel<T, true>>(rows, threads, sizeof(Shared), stream, p);
  if (status != cudaSuccess)
    return status;
  return launch<walk_trees_kernel<T>>(dim3((unsigned)p.trees), dim3(32), 0, stream, p);
}

template int verify_draft<float>(const VerifyDraftCudaParams<float>&, void*);
template int verify_draft<bf16>(const VerifyDraftCudaParams<bf16>&, void*);

} // namespace kvkeye::cuda
