// Fusion of overlapping tiles: every output element gathers its tiles once, in the order of their starts.
#include "kvkeye/video_fusion.h"
#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kVectors = 4; // at work together: as many chains of multiply-adds

// The whole result is larger than a cache would keep: lines that are overwritten are not read first.
KVKEYE_INLINE void stream(float* target, Vf value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(target, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps(target, (__m256)value);
#else
  store(target, value);
#endif
}

template <bool kGuided, class T>
KVKEYE_INLINE Vf branches_at(const T* source, int64_t branch_stride, Vf guidance, int lanes) {
  const Vf first = load(source, lanes);
  if constexpr (!kGuided)
    return first;
  return fma(guidance, load(source + branch_stride, lanes) - first, first);
}

template <bool kGuided, int N, class T>
KVKEYE_INLINE void fuse_vectors(const FuseTilesParams<T>& p, int64_t channel, int64_t frame, int64_t i,
                                int lanes, bool streams) {
  const T* outputs = p.outputs + channel * p.channel_stride + i;
  const Vf guidance = splat(p.guidance);
  Vf total[N] = {};
  for (int64_t s = p.bounds[frame]; s < p.bounds[frame + 1]; ++s) {
    const T* source = outputs + p.sources[s].offset;
    const Vf weight = splat(p.sources[s].weight);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      total[n] =
          fma(weight, branches_at<kGuided>(source + n * kLanes, p.branch_stride, guidance, lanes), total[n]);
  }
  const int64_t at = (channel * p.frames + frame) * p.plane + i;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    if (p.latent != nullptr)
      total[n] = load(p.latent + at + n * kLanes, lanes) + total[n] * p.step;
    if (N > 1 && streams)
      stream(p.out + at + n * kLanes, total[n]);
    else
      store(p.out + at + n * kLanes, total[n], lanes);
  }
}

template <bool kGuided, class T> void fuse_planes(const FuseTilesParams<T>& p, int64_t begin, int64_t end) {
  const bool streams = ((uintptr_t)p.out | (uintptr_t)(p.plane * 4)) % (kLanes * 4) == 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item / p.frames, frame = item % p.frames;
    int64_t i = 0;
    for (; i + kVectors * kLanes <= p.plane; i += kVectors * kLanes)
      fuse_vectors<kGuided, kVectors>(p, channel, frame, i, kLanes, streams);
    for_vectors(i, p.plane, [&](int64_t at, int lanes) KVKEYE_LAMBDA {
      fuse_vectors<kGuided, 1>(p, channel, frame, at, lanes, false);
    });
  }
#if defined(__AVX2__)
  _mm_sfence(); // streamed lines are visible to the thread that reads them next
#endif
}

// One plane: gradients of the branches, and sum(grad branch) for the weight's.
template <bool kGuided, class T>
KVKEYE_INLINE float differentiate_plane(const FuseTilesBackwardParams<T>& p, const float* grad, int64_t place,
                                        float weight) {
  const int64_t stride = p.tiles * p.channels * p.length * p.plane;
  const Vf guidance = splat(p.guidance);
  const float scale = weight * p.step;
  const float first = kGuided ? scale * (1.0f - p.guidance) : scale, second = scale * p.guidance;
  const T* outputs = p.outputs + place;
  T* target = p.grad_outputs + place;
  return sum_vectors(p.plane, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vf upstream = load(grad + i, lanes);
    const Vf value = branches_at<kGuided>(outputs + i, stride, guidance, lanes);
    store(target + i, upstream * first, lanes);
    if constexpr (kGuided)
      store(target + stride + i, upstream * second, lanes);
    return upstream * value;
  });
}

template <bool kGuided, class T>
void differentiate_tiles(const FuseTilesBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t tile = item / p.length, place = item % p.length;
    const int64_t shifted = (p.starts[tile] + place) % p.frames,
                  frame = shifted < 0 ? shifted + p.frames : shifted;
    float total = 0.0f;
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const float* grad = p.grad + (channel * p.frames + frame) * p.plane;
      const int64_t at = ((tile * p.channels + channel) * p.length + place) * p.plane;
      total += differentiate_plane<kGuided>(p, grad, at, p.weights[item]);
    }
    p.grad_weights[item] = total * p.step;
  }
}

} // namespace

template <class T> void fuse_tiles(const FuseTilesParams<T>& p, int64_t begin, int64_t end) {
  p.branches == 2 ? fuse_planes<true>(p, begin, end) : fuse_planes<false>(p, begin, end);
}

template <class T> void fuse_tiles_backward(const FuseTilesBackwardParams<T>& p, int64_t begin, int64_t end) {
  p.branches == 2 ? differentiate_tiles<true>(p, begin, end) : differentiate_tiles<false>(p, begin, end);
}

KVKEYE_INSTANTIATE(fuse_tiles, FuseTilesParams)
KVKEYE_INSTANTIATE(fuse_tiles_backward, FuseTilesBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
