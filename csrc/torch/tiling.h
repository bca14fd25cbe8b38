// What the outputs of overlapping tiles, their starts and weights say together.
#pragma once

#include "checks.h"

namespace kvkeye {

// Refuses what does not fit.
struct Tiling {
  Tensor outputs, starts, weights;
  int64_t branches, tiles, channels, length, frames, plane;

  Tiling(const char* op, const Tensor& of, const Tensor& at, const Tensor& with, int64_t num_frames)
      : outputs(dense(of)), starts(dense(at)), weights(dense(with)), frames(num_frames) {
    Argument{op, "outputs", of}.has_dim(6, "[g, J, C, n, h, w]");
    branches = of.size(0), tiles = of.size(1), channels = of.size(2), length = of.size(3);
    plane = of.size(4) * of.size(5);
    require(branches == 1 || branches == 2, op, ": outputs has ", branches, " branches; expected 1 or 2.");
    Argument{op, "starts", at}.has_shape({tiles});
    Argument{op, "starts", at}.has_dtype(ScalarType::Int);
    Argument{op, "weights", with}.has_shape({tiles, length});
    Argument{op, "weights", with}.has_dtype(ScalarType::Float);
    require(length <= frames, op, ": tiles of ", length, " frames are longer than the video of ", frames,
            ".");
  }

  int64_t frame_of(int64_t tile, int64_t place) const {
    const int64_t shifted = (read<int32_t>(starts)[tile] + place) % frames;
    return shifted < 0 ? shifted + frames : shifted;
  }

  std::vector<int64_t> video() const { return {channels, frames, outputs.size(4), outputs.size(5)}; }
};

// The state [C, T, h, w] that the outputs step, dense.
inline Tensor checked_latent(const char* op, const Tensor& latent, const Tensor& outputs) {
  const Argument state{op, "latent", latent};
  state.has_dim(4, "[C, T, h, w]");
  state.has_dtype(ScalarType::Float);
  Argument{op, "outputs", outputs}.has_dim(6, "[g, J, C, n, h, w]");
  state.has_shape({outputs.size(2), latent.size(1), outputs.size(4), outputs.size(5)});
  return dense(latent);
}

} // namespace kvkeye
