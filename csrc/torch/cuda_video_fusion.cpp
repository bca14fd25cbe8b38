// Fusion of overlapping tiles on the GPU: tensors to Params to the launcher. Reads no tensor value on the
// host.
#include "cuda_launch.h"
#include "kvkeye/video_fusion_cuda.h"
#include "tiling.h"

namespace kvkeye {
namespace {

Tensor fuse(const char* op, const Tiling& t, const Tensor* latent, double guidance, double dsigma) {
  constexpr int64_t kMostFrames = 65535; // of the second axis of a grid
  require(t.length <= kCudaTileFrames && t.frames <= kMostFrames, op, ": tiles of ", t.length,
          " frames in a video of ", t.frames, "; the GPU kernel takes up to ", kCudaTileFrames, " and ",
          kMostFrames, ".");
  const Launch launch(t.outputs);
  const Tensor out = empty(t.weights, t.video());
  with_type({op, "outputs", t.outputs}, [&](auto type) {
    using T = decltype(type);
    const FuseTilesCudaParams<T> params{read<T>(t.outputs),
                                        read<int32_t>(t.starts),
                                        read<float>(t.weights),
                                        latent == nullptr ? nullptr : read<float>(*latent),
                                        write<float>(out),
                                        t.branches,
                                        t.tiles,
                                        t.channels,
                                        t.length,
                                        t.frames,
                                        t.plane,
                                        (float)guidance,
                                        (float)dsigma};
    check_launch(op, cuda::fuse_tiles(params, launch.stream));
  });
  return out;
}

Tensor blend_tiles(const Tensor& outputs, const Tensor& starts, const Tensor& weights, int64_t num_frames,
                   double guidance) {
  return fuse("blend_tiles", Tiling("blend_tiles", outputs, starts, weights, num_frames), nullptr, guidance,
              1.0);
}

Tensor fuse_tiles(const Tensor& outputs, const Tensor& starts, const Tensor& weights, const Tensor& latent,
                  double guidance, double dsigma) {
  const Tensor before = checked_latent("fuse_tiles", latent, outputs);
  return fuse("fuse_tiles", Tiling("fuse_tiles", outputs, starts, weights, latent.size(1)), &before, guidance,
              dsigma);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("blend_tiles", TORCH_BOX(&blend_tiles));
  m.impl("fuse_tiles", TORCH_BOX(&fuse_tiles));
}

} // namespace kvkeye
