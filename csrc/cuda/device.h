// What the kernels need beside plain CUDA: the launch and shared memory. The one place that tells nvcc from
// the host compiler, under which csrc/host_cuda gives <cuda_runtime.h> a CPU meaning.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace kvkeye::cuda {

#ifdef __CUDACC__

// Starts Kernel with `shared` bytes of shared memory; returns a cudaError_t. Waits for nothing.
template <auto Kernel, class... Args>
int launch(dim3 grid, dim3 block, size_t shared, void* stream, const Args&... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    const cudaError_t status =
        cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (status != cudaSuccess)
      return status;
  }
  Kernel<<<grid, block, shared, (cudaStream_t)stream>>>(args...);
  return cudaGetLastError();
}

// The block's shared memory. A kernel has all of it in one struct and is launched with its size.
template <class T> __device__ T& shared_memory() {
  extern __shared__ uint4 kvkeye_shared[];
  return *reinterpret_cast<T*>(kvkeye_shared);
}

#else

template <auto Kernel, class... Args>
int launch(dim3 grid, dim3 block, size_t shared, void*, const Args&... args) {
  return host_cuda::run({__PRETTY_FUNCTION__, grid, block, shared, [args...] { Kernel(args...); }});
}

template <class T> T& shared_memory() {
  return *static_cast<T*>(host_cuda::shared_memory(sizeof(T)));
}

#endif

} // namespace kvkeye::cuda
