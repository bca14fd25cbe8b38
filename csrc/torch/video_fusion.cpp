// Fusion of overlapping tiles: tensors to Params to kernels.
#include "kvkeye/video_fusion.h"
#include "tiling.h"

namespace kvkeye {
namespace {

// Which tile frames lie on each frame. The place in a tile falls as its start rises: whatever the order of
// the tiles, a frame meets them by their starts.
struct Sources {
  std::vector<TileSource> list;
  std::vector<int64_t> bounds;

  explicit Sources(const Tiling& t) : list(t.tiles * t.length), bounds(t.frames + 1, 0) {
    for (int64_t tile = 0; tile < t.tiles; ++tile)
      for (int64_t place = 0; place < t.length; ++place)
        ++bounds[t.frame_of(tile, place) + 1];
    for (int64_t frame = 0; frame < t.frames; ++frame)
      bounds[frame + 1] += bounds[frame];
    std::vector<int64_t> next(bounds.begin(), bounds.end() - 1);
    const float* weights = read<float>(t.weights);
    for (int64_t place = t.length - 1; place >= 0; --place)
      for (int64_t tile = 0; tile < t.tiles; ++tile)
        list[next[t.frame_of(tile, place)]++] = {(tile * t.channels * t.length + place) * t.plane,
                                                 weights[tile * t.length + place]};
  }
};

Tensor fuse(const char* op, const Tiling& t, const Tensor* latent, double guidance, double dsigma) {
  const Tensor out = empty(t.weights, t.video());
  const Sources sources(t);
  with_type({op, "outputs", t.outputs}, [&](auto type) {
    using T = decltype(type);
    FuseTilesParams<T> params{};
    params.outputs = read<T>(t.outputs);
    params.sources = sources.list.data();
    params.bounds = sources.bounds.data();
    params.latent = latent == nullptr ? nullptr : read<float>(*latent);
    params.out = write<float>(out);
    params.branches = t.branches;
    params.channels = t.channels;
    params.frames = t.frames;
    params.plane = t.plane;
    params.channel_stride = t.length * t.plane;
    params.branch_stride = t.tiles * t.channels * t.length * t.plane;
    params.guidance = (float)guidance;
    params.step = (float)dsigma;
    for_items(t.channels * t.frames, t.plane * (t.branches + 2),
              [&](int64_t begin, int64_t end) { cpu::fuse_tiles(params, begin, end); });
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
  const Tiling tiling("fuse_tiles", outputs, starts, weights, latent.size(1));
  return fuse("fuse_tiles", tiling, &before, guidance, dsigma);
}

std::tuple<Tensor, Tensor> differentiate(const char* op, const Tensor& grad, const Tiling& t, double guidance,
                                         double dsigma) {
  Argument{op, "grad", grad}.has_shape({t.channels, t.frames, t.outputs.size(4), t.outputs.size(5)});
  Argument{op, "grad", grad}.has_dtype(ScalarType::Float);
  const Tensor upstream = dense(grad);
  const Tensor grad_outputs = empty_dense(t.outputs), grad_weights = empty_dense(t.weights);
  with_type({op, "outputs", t.outputs}, [&](auto type) {
    using T = decltype(type);
    FuseTilesBackwardParams<T> params{};
    params.grad = read<float>(upstream);
    params.outputs = read<T>(t.outputs);
    params.starts = read<int32_t>(t.starts);
    params.weights = read<float>(t.weights);
    params.grad_outputs = write<T>(grad_outputs);
    params.grad_weights = write<float>(grad_weights);
    params.branches = t.branches;
    params.tiles = t.tiles;
    params.channels = t.channels;
    params.length = t.length;
    params.frames = t.frames;
    params.plane = t.plane;
    params.guidance = (float)guidance;
    params.step = (float)dsigma;
    for_items(t.tiles * t.length, 3 * t.branches * t.channels * t.plane,
              [&](int64_t begin, int64_t end) { cpu::fuse_tiles_backward(params, begin, end); });
  });
  return {grad_outputs, grad_weights};
}

std::tuple<Tensor, Tensor> blend_tiles_backward(const Tensor& grad, const Tensor& outputs,
                                                const Tensor& starts, const Tensor& weights,
                                                int64_t num_frames, double guidance) {
  constexpr const char* op = "blend_tiles_backward";
  return differentiate(op, grad, Tiling(op, outputs, starts, weights, num_frames), guidance, 1.0);
}

std::tuple<Tensor, Tensor, Tensor> fuse_tiles_backward(const Tensor& grad, const Tensor& outputs,
                                                       const Tensor& starts, const Tensor& weights,
                                                       const Tensor& latent, double guidance, double dsigma) {
  constexpr const char* op = "fuse_tiles_backward";
  Argument{op, "grad", grad}.has_shape_of("latent", latent);
  Argument{op, "grad", grad}.has_dim(4, "[C, T, h, w]");
  const auto [grad_outputs, grad_weights] =
      differentiate(op, grad, Tiling(op, outputs, starts, weights, latent.size(1)), guidance, dsigma);
  const Tensor grad_latent = empty_dense(grad);
  torch::stable::copy_(const_cast<Tensor&>(grad_latent), grad);
  return {grad_outputs, grad_weights, grad_latent};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("blend_tiles", TORCH_BOX(&blend_tiles));
  m.impl("blend_tiles_backward", TORCH_BOX(&blend_tiles_backward));
  m.impl("fuse_tiles", TORCH_BOX(&fuse_tiles));
  m.impl("fuse_tiles_backward", TORCH_BOX(&fuse_tiles_backward));
}

} // namespace kvkeye
