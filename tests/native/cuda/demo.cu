// Small kernels, right and wrong, that show what the harness catches. WITHOUT_BARRIER, WITHOUT_SYNCWARP: the
// same with one of the two removed.
#include "case.h"
#include "ptx.h"

using namespace kvkeye::cuda;

namespace {

constexpr int kThreads = 96;

struct Line {
  int words[kThreads];
};

// Each block reverses its words through shared memory.
__global__ void __launch_bounds__(kThreads) reverse_kernel(const int* in, int* out) {
  Line& line = shared_memory<Line>();
  const int first = (int)blockIdx.x * kThreads, i = (int)threadIdx.x;
  line.words[i] = in[first + i];
#ifndef WITHOUT_BARRIER
  __syncthreads();
#endif
  out[first + i] = line.words[kThreads - 1 - i];
}

// As reverse, by a barrier with a value.
__global__ void counted_reverse_kernel(const int* in, int* out) {
  Line& line = shared_memory<Line>();
  const int i = (int)threadIdx.x;
  line.words[i] = in[i];
  const int odd = __syncthreads_count(in[i] & 1); // reversed
  out[i] = odd * line.words[kThreads - 1 - i];
}

// Each thread hands its word to the next lane through shared memory: a warp is enough to wait for.
__global__ void rotate_kernel(const int* in, int* out) {
  Line& line = shared_memory<Line>();
  const int i = (int)threadIdx.x, warp = i & -32;
  line.words[i] = in[i];
#ifndef WITHOUT_SYNCWARP
  __syncwarp();
#endif
  out[i] = line.words[warp + ((i + 1) & 31)];
}

// Every word of a warp becomes the warp's sum, by each kind of shuffle in turn; then votes.
__global__ void warp_kernel(const int* in, int* out) {
  const int i = (int)threadIdx.x;
  int sum = in[i];
  for (int bits = 16; bits > 0; bits /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  int down = in[i];
  for (int delta = 4; delta > 0; delta /= 2)
    down += __shfl_down_sync(0xffffffffu, down, delta, 8); // sums of eight, right in every eighth lane
  const int eighth = __shfl_sync(0xffffffffu, down, 0, 8);
  const int before = __shfl_up_sync(0xffffffffu, in[i], 1u); // lane 0 keeps its own
  const unsigned votes = __ballot_sync(0xffffffffu, in[i] & 1);
  out[5 * i] = sum;
  out[5 * i + 1] = eighth;
  out[5 * i + 2] = before;
  out[5 * i + 3] = (int)votes;
  out[5 * i + 4] = 2 * __any_sync(0xffffffffu, in[i] == 7) + __all_sync(0xffffffffu, in[i] >= 0);
}

__global__ void count_kernel(const int* in, int* out) {
  const int odd = __syncthreads_count(in[threadIdx.x] & 1);
  const int any = __syncthreads_or(in[threadIdx.x] < 0), all = __syncthreads_and(in[threadIdx.x] < 1000);
  atomicAdd(&out[0], odd);
  atomicAdd(&out[1], 10 * any + all);
  atomicMax(&out[2], (int)in[threadIdx.x]);
}

__global__ void unwritten_kernel(const int*, int* out) {
  out[threadIdx.x] = shared_memory<Line>().words[threadIdx.x];
}

__global__ void global_overrun_kernel(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

// Four bytes at an odd place, past the end of shared memory by a pointer, and past one array by an index.
__global__ void misaligned_kernel(const int* in, int* out) {
  out[threadIdx.x] = *reinterpret_cast<const int*>(reinterpret_cast<const char*>(in) + 1);
}
__global__ void shared_overrun_kernel(const int* in, int*) {
  int* words = shared_memory<Line>().words;
  words[threadIdx.x + 1] = in[threadIdx.x];
}
struct Pair {
  int first[kThreads], second[kThreads];
};
__global__ void member_overrun_kernel(const int* in, int*) {
  shared_memory<Pair>().first[threadIdx.x + 1] = in[threadIdx.x];
}

__global__ void one_returns_kernel(const int*, int*) {
  if (threadIdx.x == 5)
    return;
  __syncthreads();
}

__global__ void two_barriers_kernel(const int*, int*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void missing_lane_kernel(const int* in, int* out) {
  if (threadIdx.x % 32 != 3)
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
}

__global__ void silent_lane_kernel(const int* in, int* out) {
  if (threadIdx.x % 32 < 16) // lane 20 is read, but not in the mask
    out[threadIdx.x] = __shfl_sync(0xffffu, in[threadIdx.x], 20);
}

__global__ void trap_kernel(const int*, int*) {
  if (blockIdx.x == 1 && threadIdx.x == 7)
    __trap();
}

// All blocks write the same value to the same word: right in the end, and still a race.
__global__ void same_word_kernel(const int*, int* out) {
  out[0] = 1;
}

// Each thread brings four words of the line by an asynchronous copy and hands them to another one.
struct Lines {
  uint4 words[kThreads];
};
enum class Lacks { nothing, commit, wait, barrier };

template <Lacks Lack> __global__ void copy_kernel(const int* in, int* out) {
  Lines& lines = shared_memory<Lines>();
  const int i = (int)threadIdx.x;
  copy_async(&lines.words[i], in + 4 * i, i % 2 == 0); // zeros where there is nothing to copy
  if (Lack != Lacks::commit)
    commit_copies();
  if (Lack != Lacks::wait)
    wait_copies<0>();
  if (Lack != Lacks::barrier)
    __syncthreads();
  *reinterpret_cast<uint4*>(out + 4 * i) = lines.words[kThreads - 1 - i];
}

// out[1] = the sum of what all blocks wrote, by the block that arrives last; out[0] counts and is zero again.
enum class Fence { both, none_before, none_after };

template <Fence Fences> __global__ void fold_kernel(const int* in, int* out) {
  const int block = (int)blockIdx.x, blocks = (int)gridDim.x;
  if (threadIdx.x == 0) {
    out[2 + block] = in[block];
    if (Fences != Fence::none_before)
      __threadfence();
    const bool last = atomicAdd(&out[0], 1) == blocks - 1;
    if (Fences != Fence::none_after)
      __threadfence();
    if (last) {
      int sum = 0;
      for (int i = 0; i < blocks; ++i)
        sum += out[2 + i];
      out[1] = sum;
      atomicExch(&out[0], 0);
    }
  }
}

// out [16, 8] = a times the transpose of b, then [16, 16] = a times v, whose columns a transposed load
// brings.
struct Operands {
  uint4 a[16][2], b[8][2], v[16][2];
};

__global__ void product_kernel(const int* in, int* out) {
  Operands& shared = shared_memory<Operands>();
  const int lane = (int)threadIdx.x;
  const uint4* words = reinterpret_cast<const uint4*>(in);
  shared.a[lane / 2][lane % 2] = words[lane];
  shared.v[lane / 2][lane % 2] = words[48 + lane];
  if (lane < 16)
    shared.b[lane / 2][lane % 2] = words[32 + lane];
  __syncwarp();
  uint32_t a[4], b[4], v[4];
  load_matrices(a, &shared.a[lane % 16][lane / 16]);
  load_matrices(b, &shared.b[lane % 8][lane / 8 % 2]);
  load_matrices_transposed(v, &shared.v[lane % 16][lane / 16]);
  float keys[4] = {}, values[2][4] = {};
  multiply_add(keys, a, b[0], b[1]);
  multiply_add(values[0], a, v[0], v[1]);
  multiply_add(values[1], a, v[2], v[3]);
  float* found = reinterpret_cast<float*>(out);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    found[8 * row + column] = keys[i];
    found[128 + 16 * row + column] = values[0][i];
    found[128 + 16 * row + 8 + column] = values[1][i];
  }
}

// What an order can be seen by: the ticket of each thread.
__global__ void order_kernel(const int*, int* out) {
  const int i = (int)(blockIdx.x * kThreads + threadIdx.x);
  out[1 + i] = atomicAdd(&out[0], 1);
}

template <auto Kernel> int start(kvkeye::host_cuda::Case& c) {
  const int blocks = (int)c.number("blocks");
  const size_t shared = c.number("shared") != 0 ? sizeof(Line) * (size_t)c.number("shared") : 0;
  return launch<Kernel>(dim3((unsigned)blocks), dim3((unsigned)c.number("threads")), shared, nullptr,
                        (const int*)c.buffer<int>("in"), c.buffer<int>("out"));
}

#define DEMO(name) const kvkeye::host_cuda::Register name##_demo(#name, &start<name##_kernel>);
DEMO(reverse)
DEMO(counted_reverse)
DEMO(rotate)
DEMO(warp)
DEMO(count)
DEMO(unwritten)
DEMO(global_overrun)
DEMO(misaligned)
DEMO(shared_overrun)
DEMO(member_overrun)
DEMO(one_returns)
DEMO(two_barriers)
DEMO(missing_lane)
DEMO(silent_lane)
DEMO(trap)
DEMO(same_word)
DEMO(order)
DEMO(product)
#define DEMO_OF(name, kernel) const kvkeye::host_cuda::Register name##_demo(#name, &start<kernel>);
DEMO_OF(copy, copy_kernel<Lacks::nothing>)
DEMO_OF(copy_no_commit, copy_kernel<Lacks::commit>)
DEMO_OF(copy_no_wait, copy_kernel<Lacks::wait>)
DEMO_OF(copy_no_barrier, copy_kernel<Lacks::barrier>)
DEMO_OF(fold, fold_kernel<Fence::both>)
DEMO_OF(fold_no_fence_before, fold_kernel<Fence::none_before>)
DEMO_OF(fold_no_fence_after, fold_kernel<Fence::none_after>)

} // namespace
