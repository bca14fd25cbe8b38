// spectral_blend with the Gaussian: matrices from cut-offs, tensors to Params to kernels, volume by volume.
#include "kvkeye/video_fusion_spectral.h"
#include "heads.h"

#include <cmath>

namespace kvkeye {
namespace {

// The symmetric circulant matrix [size, padded] that multiplies frequency f by exp(-(f / cutoff)^2 / 2), f in
// [-1, 1); computed in fp64.
std::vector<float> circulant(int64_t size, int64_t padded, double cutoff) {
  const double turn = 2 * std::acos(-1.0) / (double)size;
  std::vector<double> wave(size), response(size, 0.0);
  for (int64_t i = 0; i < size; ++i)
    wave[i] = std::cos(turn * (double)i);
  for (int64_t k = 0; k < size; ++k) {
    const double f = 2.0 * (double)std::min(k, size - k) / (double)size / cutoff;
    const double gain = std::exp(-0.5 * f * f) / (double)size;
    for (int64_t i = 0, phase = 0; i < size; ++i, phase = (phase + k) % size)
      response[i] += gain * wave[phase];
  }
  std::vector<float> matrix(size * padded, 0.0f);
  for (int64_t row = 0; row < size; ++row)
    for (int64_t column = 0; column < size; ++column)
      matrix[row * padded + column] = (float)response[(column - row + size) % size];
  return matrix;
}

// out = high + L(low - high) and, where it is asked for, rest = low - L(low).
void filter(const char* op, const Tensor& low, const Tensor* high, const Tensor& out, const Tensor* rest,
            double cutoff_space, double cutoff_time, int64_t butterworth_order) {
  require(butterworth_order == 0, op, ": butterworth_order is ", butterworth_order,
          "; the C++ kernel has the Gaussian (0). Use the eager backend.");
  const int64_t axes = low.dim(), frames = low.size(axes - 3), height = low.size(axes - 2),
                width = low.size(axes - 1), padded = padded_dim(width), size = frames * height * width;
  if (low.numel() == 0)
    return;
  const auto over_time = circulant(frames, frames, cutoff_time);
  const auto over_height = circulant(height, height, cutoff_space);
  const auto over_width = circulant(width, padded, cutoff_space);
  const std::unique_ptr<float[]> volume(new float[frames * height * padded]);
  with_type({op, "low", low}, [&](auto type) {
    using T = decltype(type);
    SpectralBlendParams<T> params{};
    params.over_time = over_time.data();
    params.over_height = over_height.data();
    params.over_width = over_width.data();
    params.volume = volume.get();
    params.frames = frames;
    params.height = height;
    params.width = width;
    params.padded = padded;
    const int64_t plane_cost = height * width * (height + width) / 8,
                  scratch = spectral_scratch(frames, height, padded);
    for (int64_t at = 0; at < low.numel(); at += size) {
      params.low = read<T>(low) + at;
      params.high = high == nullptr ? nullptr : read<T>(*high) + at;
      params.out = write<T>(out) + at;
      params.rest = rest == nullptr ? nullptr : write<T>(*rest) + at;
      for_items_with_scratch(
          params, frames, plane_cost, scratch,
          [](const auto& p, int64_t begin, int64_t end) { cpu::filter_planes(p, begin, end); });
      for_items_with_scratch(
          params, (height * padded + kStripColumns - 1) / kStripColumns, frames * frames * kStripColumns / 8,
          scratch, [](const auto& p, int64_t begin, int64_t end) { cpu::filter_frames(p, begin, end); });
    }
  });
}

void check_video(const Argument& argument) {
  require(argument.tensor.dim() >= 3, argument.op, ": ", argument.name, " has ", argument.tensor.dim(),
          " dimensions; expected [..., T, h, w].");
}

Tensor spectral_blend(const Tensor& low, const Tensor& high, double cutoff_space, double cutoff_time,
                      int64_t butterworth_order) {
  const char* op = "spectral_blend";
  check_video({op, "low", low});
  Argument{op, "high", high}.has_shape_of("low", low);
  Argument{op, "high", high}.has_dtype(low.scalar_type());
  const Tensor mine = dense(low), other = dense(high), out = empty_dense(low);
  filter(op, mine, &other, out, nullptr, cutoff_space, cutoff_time, butterworth_order);
  return out;
}

std::tuple<Tensor, Tensor> spectral_blend_backward(const Tensor& grad, double cutoff_space,
                                                   double cutoff_time, int64_t butterworth_order) {
  const char* op = "spectral_blend_backward";
  check_video({op, "grad", grad});
  const Tensor upstream = dense(grad), low = empty_dense(grad), high = empty_dense(grad);
  filter(op, upstream, nullptr, low, &high, cutoff_space, cutoff_time, butterworth_order);
  return {low, high};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("spectral_blend", TORCH_BOX(&spectral_blend));
  m.impl("spectral_blend_backward", TORCH_BOX(&spectral_blend_backward));
}

} // namespace kvkeye
