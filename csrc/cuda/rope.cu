// Queries and keys normed and turned, keys and values written to the paged cache, in one pass over the
// projection.
//
// A head belongs to dim / 8 neighbouring lanes, 16 bytes of bf16 each; the lane dim / 16 away holds the other
// halves of its pairs. A block of threads takes kHeads heads of one token, whose angles it computes once.
#include "kvkeye/rope_cuda.h"

#include "e4m3.h"

namespace kvkeye::cuda {
namespace {

constexpr int kThreads = 128, kEach = 8; // values of a lane
constexpr int kHeads = 16;
constexpr int kBlocksPerSm = 8; // 64 registers a thread: none spills on any target

template <int Dim> struct Angles {
  float cos[Dim / 2], sin[Dim / 2];
};

// sin and cos of any angle below 2^21 to 1e-7: the multiple of pi / 2 is taken off in two parts of fp64, the
// rest goes to polynomials of Cephes. The library's sinf would keep a table in local memory for its far
// range.
__device__ void turn_of(float angle, float& cosine, float& sine) {
  const double quarters = rint((double)angle * 0.63661977236758134);
  double rest = fma(quarters, -1.5707963267948966, (double)angle);
  rest = fma(quarters, -6.123233995736766e-17, rest);
  const float r = (float)rest, z = r * r;
  const float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f) * z, r, r);
  const float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f),
                       z * z, fmaf(-0.5f, z, 1.0f));
  const int64_t quarter = (int64_t)quarters;
  const bool swapped = (quarter & 1) != 0;
  sine = (quarter & 2) != 0 ? -(swapped ? c : s) : (swapped ? c : s);
  cosine = ((quarter + 1) & 2) != 0 ? -(swapped ? s : c) : (swapped ? s : c);
}

template <int Dim, class Params>
__device__ void fill_angles(Angles<Dim>& angles, const Params& p, int64_t token) {
  for (int i = (int)threadIdx.x; i < Dim / 2; i += kThreads) {
    const int axis = (i >= p.section_ends[0]) + (i >= p.section_ends[1]);
    const float position = (float)p.positions[axis * p.tokens + token];
    turn_of(__fmul_rn(position, p.frequency[i]), angles.cos[i], angles.sin[i]);
  }
}

__device__ __forceinline__ void load(const float* source, float (&x)[kEach]) {
  const float4 first = *reinterpret_cast<const float4*>(source),
               second = *reinterpret_cast<const float4*>(source + 4);
  x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
  x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
}

__device__ __forceinline__ void load(const bf16* source, float (&x)[kEach]) {
  const uint4 words = *reinterpret_cast<const uint4*>(source);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(word[i] << 16);
    x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void store(float* target, const float (&x)[kEach]) {
  *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(target + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void store(bf16* target, const float (&x)[kEach]) {
  *reinterpret_cast<uint4*>(target) =
      make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

__device__ __forceinline__ void store(e4m3* target, const float (&x)[kEach], float scale) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    words[i / 4] |= level_of(x[i], scale) << 8 * (i % 4);
  *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
}

// The value as it reads back after being stored as T.
template <class T> __device__ __forceinline__ float rounded(float x);
template <> __device__ __forceinline__ float rounded<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ float rounded<bf16>(float x) {
  return __uint_as_float(pack_bf16(0.0f, x));
}

// All lanes of the head hold x; its mean square decides the scale.
template <class T, int Dim> __device__ void norm(float (&x)[kEach], const T* weight, int lane, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    squares = fmaf(x[i], x[i], squares);
#pragma unroll
  for (int other = Dim / kEach / 2; other > 0; other /= 2)
    squares += __shfl_xor_sync(0xffffffffu, squares, other);
  const float scale = 1.0f / sqrtf(squares / (float)Dim + eps);
  float w[kEach];
  load(weight + kEach * lane, w);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    x[i] = rounded<T>(__fmul_rn(rounded<T>(__fmul_rn(x[i], scale)), w[i]));
}

// What the head's levels are multiplied with. All of its lanes hold x.
template <int Dim> __device__ float head_scale(const float (&x)[kEach]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    largest = max(largest, magnitude_of(x[i]));
#pragma unroll
  for (int other = Dim / kEach / 2; other > 0; other /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
  return scale_of(largest);
}

// y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin; x1 lies in the first half of the lanes.
template <int Dim> __device__ void turn(float (&x)[kEach], const Angles<Dim>& angles, int lane) {
  const bool first = lane < Dim / 16;
  const int column = kEach * (first ? lane : lane - Dim / 16);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float other = __shfl_xor_sync(0xffffffffu, x[i], Dim / 16);
    const float sine = angles.sin[column + i];
    x[i] = __fmaf_rn(other, first ? -sine : sine, __fmul_rn(x[i], angles.cos[column + i]));
  }
}

// Grid: tokens, kHeads heads each.
template <class T, class C, int Dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    qk_norm_mrope_append_kernel(const __grid_constant__ QkNormMropeAppendCudaParams<T, C> p) {
  constexpr int kLanes = Dim / kEach; // of a head
  constexpr int kAtOnce = kThreads / kLanes;
  Angles<Dim>& angles = shared_memory<Angles<Dim>>();
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot >= p.slots)
    __trap();
  fill_angles(angles, p, token);
  __syncthreads();
  const int lane = (int)threadIdx.x % kLanes, heads = p.num_q_heads + 2 * p.num_kv_heads;
  const int64_t first_row = slot / p.block_size * p.num_kv_heads * p.block_size + slot % p.block_size;
#pragma unroll
  for (int i = 0; i < kHeads; i += kAtOnce) {
    const int head = (int)blockIdx.y * kHeads + i + (int)threadIdx.x / kLanes;
    const bool valid = head < heads, query = head < p.num_q_heads, value = head >= heads - p.num_kv_heads;
    float x[kEach] = {}, y[kEach];
    if (valid)
      load(p.qkv + token * p.stride + head * Dim + kEach * lane, x);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      y[j] = x[j];
    norm<T, Dim>(y, query ? p.q_weight : p.k_weight, lane,
                 p.eps); // of values too: the warp's lanes go together
    turn<Dim>(y, angles, lane);
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      y[j] = value ? x[j] : y[j];
    [[maybe_unused]] float scale = 0.0f;
    if constexpr (kIsE4m3<C>) {
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        y[j] = rounded<T>(y[j]); // as the separate ops would
      scale = head_scale<Dim>(y);
    }
    if (!valid || (!query && slot < 0))
      continue;
    if (query) {
      store(p.q + (token * p.num_q_heads + head) * Dim + kEach * lane, y);
      continue;
    }
    const int kv_head = (head - p.num_q_heads) % p.num_kv_heads;
    const int64_t row = first_row + (int64_t)kv_head * p.block_size;
    C* target = (value ? p.v_cache : p.k_cache) + row * Dim + kEach * lane;
    if constexpr (kIsE4m3<C>) {
      store(target, y, scale);
      if (lane == 0)
        (value ? p.v_scales : p.k_scales)[row] = scale;
    } else {
      store(target, y);
    }
  }
}

template <class T, class C, int Dim> int start(const QkNormMropeAppendCudaParams<T, C>& p, void* stream) {
  const int heads = p.num_q_heads + 2 * p.num_kv_heads;
  const dim3 grid((unsigned)p.tokens, (unsigned)((heads + kHeads - 1) / kHeads));
  return launch<qk_norm_mrope_append_kernel<T, C, Dim>>(grid, dim3(kThreads), sizeof(Angles<Dim>), stream, p);
}

} // namespace

template <class T, class C>
int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<T, C>& p, int64_t dim, void* stream) {
  if (p.tokens == 0)
    return cudaSuccess;
  if (dim == 64)
    return start<T, C, 64>(p, stream);
  if (dim == 128)
    return start<T, C, 128>(p, stream);
  if constexpr (!kIsE4m3<C>)
    if (dim == 256)
      return start<T, C, 256>(p, stream);
  return cudaErrorInvalidValue;
}

template int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<float>&, int64_t, void*);
template int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<bf16>&, int64_t, void*);
template int qk_norm_mrope_append(const QkNormMropeAppendCudaParams<bf16, e4m3>&, int64_t, void*);

} // namespace kvkeye::cuda
