// Fusion of overlapping tiles: every output element gathers its tiles once, in the order of their starts.
//
// A block belongs to one frame. It finds the tiles that hold the frame by their starts, without the host;
// each thread then walks them for its vectors of the frame's channels. No atomics, no scratch, one launch.
#include "kvkeye/video_fusion_cuda.h"

#include "device.h"

#include <cmath>
#include <cstring>

namespace kvkeye::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 2;
constexpr int kWide = 8; // elements of a vector: 16 bytes of bf16

struct Shared {
  int tile[kCudaTileFrames]; // the tile in which the block's frame stands at this place, or -1
};

template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

__device__ float widened(float value) {
  return value;
}

__device__ float widened(bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T, int N> __device__ Pack<T, N> load(const T* source) {
  return *reinterpret_cast<const Pack<T, N>*>(source);
}

template <class T> __device__ void find_tiles(const FuseTilesCudaParams<T>& p, int frame, Shared& shared) {
  for (int place = threadIdx.x; place < (int)p.length; place += blockDim.x)
    shared.tile[place] = -1;
  __syncthreads();
  for (int tile = threadIdx.x; tile < (int)p.tiles; tile += blockDim.x) {
    const int shifted = (frame - p.starts[tile] % (int)p.frames) % (int)p.frames;
    const int place = shifted < 0 ? shifted + (int)p.frames : shifted;
    if (place < (int)p.length)
      shared.tile[place] = tile;
  }
  __syncthreads();
}

// total += weight * (u + guidance (p - u)), or weight * u of one branch.
template <class T, bool kGuided, int N>
__device__ void add_tile(const FuseTilesCudaParams<T>& p, int64_t at, float weight, float (&total)[N]) {
  const Pack<T, N> first = load<T, N>(p.outputs + at);
  Pack<T, N> second{};
  if (kGuided)
    second = load<T, N>(p.outputs + at + p.tiles * p.channels * p.length * p.plane);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float value = widened(first.value[i]);
    if (kGuided)
      value = fmaf(p.guidance, widened(second.value[i]) - value, value);
    total[i] = fmaf(weight, value, total[i]);
  }
}

template <class T, bool kGuided, int N>
__device__ void fuse_vector(const FuseTilesCudaParams<T>& p, int frame, int64_t channel, int64_t first,
                            const Shared& shared) {
  float total[N] = {};
  for (int place = (int)p.length - 1; place >= 0; --place) {
    const int64_t tile = shared.tile[place];
    if (tile < 0)
      continue;
    const int64_t at = ((tile * p.channels + channel) * p.length + place) * p.plane + first;
    add_tile<T, kGuided, N>(p, at, p.weights[tile * p.length + place], total);
  }
  const int64_t at = (channel * p.frames + frame) * p.plane + first;
  Pack<float, N> result{};
  if (p.latent != nullptr)
    result = load<float, N>(p.latent + at);
#pragma unroll
  for (int i = 0; i < N; ++i)
    result.value[i] = p.latent != nullptr ? fmaf(p.step, total[i], result.value[i]) : total[i];
  *reinterpret_cast<Pack<float, N>*>(p.out + at) = result;
}

// Grid: pieces of a frame, frames.
template <class T, bool kGuided, int N> __global__ void fuse_tiles_kernel(FuseTilesCudaParams<T> p) {
  Shared& shared = shared_memory<Shared>();
  const int frame = (int)blockIdx.y;
  find_tiles(p, frame, shared);
  const int64_t per_channel = p.plane / N, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.channels * per_channel; i += step)
    fuse_vector<T, kGuided, N>(p, frame, i / per_channel, i % per_channel * N, shared);
}

template <class T, bool kGuided, int N> int launch_fuse(const FuseTilesCudaParams<T>& p, void* stream) {
  const int64_t vectors = p.channels * (p.plane / N), per_block = kThreads * kVectorsPerThread;
  const dim3 grid((unsigned)((vectors + per_block - 1) / per_block), (unsigned)p.frames);
  return launch<fuse_tiles_kernel<T, kGuided, N>>(grid, kThreads, sizeof(Shared), stream, p);
}

template <class T, bool kGuided> int fuse_aligned(const FuseTilesCudaParams<T>& p, void* stream) {
  const uint64_t addresses = (uint64_t)p.outputs | (uint64_t)p.latent | (uint64_t)p.out;
  if (p.plane % kWide == 0 && addresses % 16 == 0)
    return launch_fuse<T, kGuided, kWide>(p, stream);
  return launch_fuse<T, kGuided, 1>(p, stream);
}

} // namespace

template <class T> int fuse_tiles(const FuseTilesCudaParams<T>& p, void* stream) {
  if (p.length > kCudaTileFrames)
    return cudaErrorInvalidValue;
  if (p.channels * p.frames * p.plane == 0)
    return cudaSuccess;
  return p.branches == 2 ? fuse_aligned<T, true>(p, stream) : fuse_aligned<T, false>(p, stream);
}

template int fuse_tiles<float>(const FuseTilesCudaParams<float>&, void*);
template int fuse_tiles<bf16>(const FuseTilesCudaParams<bf16>&, void*);

} // namespace kvkeye::cuda
