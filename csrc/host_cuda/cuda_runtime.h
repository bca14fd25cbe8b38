// Stands in for the CUDA toolkit's header when the host compiler builds a .cu file for the test suite.
//
// Only what the kernels use has a meaning here; the rest does not compile. `__shared__` is left out on
// purpose: shared memory comes from kvkeye::cuda::shared_memory, where it can be poisoned and watched.
#pragma once

#include "grid.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() {
  return cudaSuccess; // run() has returned its own
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}

inline constexpr int warpSize = 32;
inline const dim3& gridDim = kvkeye::host_cuda::place.grid;
inline const dim3& blockDim = kvkeye::host_cuda::place.block_size;
inline const dim3& blockIdx = kvkeye::host_cuda::place.block;
inline const dim3& threadIdx = kvkeye::host_cuda::place.thread;

inline int min(int a, int b) {
  return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
  return a > b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz((unsigned)bits);
}

template <class T> T __ldg(const T* address) {
  return *address;
}

// Rounded where written: never contracted to a fused multiply-add.
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline double __fma_rn(double a, double b, double c) {
  return std::fma(a, b, c);
}
inline double __dmul_rn(double a, double b) {
  return a * b;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Every waiting call notes its line by default arguments, for the report of a deadlock.
#define KVKEYE_HERE kvkeye::host_cuda::Line here = {__builtin_FILE(), __builtin_LINE()}
#define KVKEYE_FULL_MASK unsigned mask = 0xffffffffu

[[noreturn]] inline void __trap(KVKEYE_HERE) {
  kvkeye::host_cuda::trap(here);
}

inline void __syncthreads(KVKEYE_HERE) {
  kvkeye::host_cuda::barrier("__syncthreads", 0, here);
}
inline int __syncthreads_count(int predicate, KVKEYE_HERE) {
  return kvkeye::host_cuda::barrier("__syncthreads_count", predicate != 0, here);
}
inline int __syncthreads_or(int predicate, KVKEYE_HERE) {
  return kvkeye::host_cuda::barrier("__syncthreads_or", predicate != 0, here) != 0;
}
inline int __syncthreads_and(int predicate, KVKEYE_HERE) {
  const dim3& size = kvkeye::host_cuda::place.block_size;
  const int threads = (int)(size.x * size.y * size.z);
  return kvkeye::host_cuda::barrier("__syncthreads_and", predicate != 0, here) == threads;
}
inline void __threadfence() {
  kvkeye::host_cuda::fence();
  kvkeye::host_cuda::give_way();
}

inline void __syncwarp(KVKEYE_FULL_MASK, KVKEYE_HERE) {
  kvkeye::host_cuda::exchange("__syncwarp", mask, 0, here);
}

namespace kvkeye::host_cuda {

// The value of lane `source`, or the own one where the source is outside the segment or, as undefined on a
// GPU, an error where the source is not in the mask.
template <class T> T shuffle(const char* what, unsigned mask, T value, int source, Line here) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* lanes = exchange(what, mask, bits, here);
  if (source < 0)
    return value;
  require_lane(what, mask, source, here);
  std::memcpy(&value, &lanes[source], sizeof(T));
  return value;
}

} // namespace kvkeye::host_cuda

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, KVKEYE_HERE) {
  const int first = kvkeye::host_cuda::lane() & -width;
  return kvkeye::host_cuda::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), here);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, KVKEYE_HERE) {
  const int lane = kvkeye::host_cuda::lane(), source = lane ^ bits;
  const bool inside = source < (lane & -width) + width; // an earlier segment may be read, a later one not
  return kvkeye::host_cuda::shuffle("__shfl_xor_sync", mask, value, inside ? source : -1, here);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KVKEYE_HERE) {
  const int lane = kvkeye::host_cuda::lane(), source = lane - (int)delta;
  const bool inside = source >= (lane & -width);
  return kvkeye::host_cuda::shuffle("__shfl_up_sync", mask, value, inside ? source : -1, here);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KVKEYE_HERE) {
  const int lane = kvkeye::host_cuda::lane(), source = lane + (int)delta;
  const bool inside = source < (lane & -width) + width;
  return kvkeye::host_cuda::shuffle("__shfl_down_sync", mask, value, inside ? source : -1, here);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, KVKEYE_HERE) {
  const uint64_t* lanes = kvkeye::host_cuda::exchange("__ballot_sync", mask, predicate != 0, here);
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane)
    votes |= (unsigned)(mask >> lane & lanes[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, KVKEYE_HERE) {
  return __ballot_sync(mask, predicate, here) != 0;
}
inline int __all_sync(unsigned mask, int predicate, KVKEYE_HERE) {
  return __ballot_sync(mask, predicate, here) == mask;
}

// One thread runs at a time and none is interrupted: a plain update is atomic.
template <class T> T atomicAdd(T* address, T value) {
  return kvkeye::host_cuda::atomic_update(address, [=](T before) { return T(before + value); });
}
template <class T> T atomicMax(T* address, T value) {
  return kvkeye::host_cuda::atomic_update(address, [=](T before) { return before < value ? value : before; });
}
template <class T> T atomicMin(T* address, T value) {
  return kvkeye::host_cuda::atomic_update(address, [=](T before) { return before > value ? value : before; });
}
template <class T> T atomicExch(T* address, T value) {
  return kvkeye::host_cuda::atomic_update(address, [=](T) { return value; });
}

#undef KVKEYE_HERE
#undef KVKEYE_FULL_MASK
