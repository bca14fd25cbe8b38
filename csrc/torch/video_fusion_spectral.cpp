// spectral_blend: tables from sizes and cut-offs, tensors to Params to kernels, volume by volume.
#include "kvkeye/video_fusion_spectral.h"
#include "fft_plan.h"
#include "heads.h"
#include "kvkeye/common/blocks.h"

namespace kvkeye {
namespace {

struct Filter {
  double cutoff_space, cutoff_time;
  int64_t butterworth_order; // 0 for the Gaussian

  double gain(double distance) const {
    if (butterworth_order == 0)
      return std::exp(-0.5 * distance);
    double power = 1;
    for (int64_t bits = butterworth_order; bits > 0; bits >>= 1, distance *= distance)
      if (bits & 1)
        power *= distance;
    return 1 / (1 + power);
  }
};

// Squared frequencies over the squared cut-off, f in [-1, 1).
std::vector<double> squared_frequencies(int64_t size, double cutoff) {
  std::vector<double> squares(size);
  for (int64_t k = 0; k < size; ++k) {
    const double f = 2.0 * (double)std::min(k, size - k) / (double)size / cutoff;
    squares[k] = f * f;
  }
  return squares;
}

// One volume's sizes and what its transforms look up.
class Spectrum {
public:
  Spectrum(const char* op, const Tensor& video)
      : frames(video.size(video.dim() - 3)), height(video.size(video.dim() - 2)),
        width(video.size(video.dim() - 1)), time_(op, "T =", frames), rows_(op, "h =", height),
        columns_(op, "w =", width) {
    time = time_.plan();
    rows = rows_.plan();
    columns = columns_.plan();
  }

  // [frames / 2 + 1, height, pitch]: in the transforms' order, over their factor of the size, and over the 2
  // by which the kernel's pairs of columns come out too large.
  std::vector<float> gains(const Filter& filter) const {
    const int64_t pitch = spectral_pitch(width);
    const auto over_time = squared_frequencies(frames, filter.cutoff_time);
    const auto over_rows = squared_frequencies(height, filter.cutoff_space);
    const auto over_columns = squared_frequencies(width, filter.cutoff_space);
    const double factor = 0.5 / ((double)frames * (double)height * (double)width);
    std::vector<float> gains((frames / 2 + 1) * height * pitch, 0.0f);
    for_items(frames / 2 + 1, height * width * 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t y = 0; y <= height / 2; ++y) {
          float* row = gains.data() + (t * height + rows.place[y]) * pitch;
          for (int64_t x = 0; x <= width / 2; ++x) {
            const double gain = factor * filter.gain(over_time[t] + over_rows[y] + over_columns[x]);
            row[columns.place[x]] = row[columns.place[x ? width - x : 0]] = (float)gain;
          }
          if (y > 0) // the opposite frequency
            std::copy(row, row + width, gains.data() + (t * height + rows.place[height - y]) * pitch);
        }
    });
    return gains;
  }

  const int64_t frames, height, width;
  FftPlan time, rows, columns;

private:
  FftTables time_, rows_, columns_;
};

// The three passes over one volume.
template <class T> void filter_volume(const SpectralBlendParams<T>& params) {
  const int64_t frames = params.time->size, height = params.rows->size, width = params.columns->size;
  const int64_t pairs = params.padded / (2 * params.strip), cost = 16 * frames * params.strip;
  const int64_t together = std::clamp<int64_t>(pairs / 32, 1, 8); // each asks for what the next one reads
  const int64_t scratch = spectral_scratch(frames, height, width);
  for_items_with_scratch(
      params, pairs, cost, scratch,
      [](const auto& p, int64_t begin, int64_t end) { cpu::spectrum_of_frames(p, begin, end); }, together);
  for_items_with_scratch(
      params, frames / 2 + 1, 32 * params.plane, scratch,
      [](const auto& p, int64_t begin, int64_t end) { cpu::filter_spectrum(p, begin, end); });
  for_items_with_scratch(
      params, pairs, cost, scratch,
      [](const auto& p, int64_t begin, int64_t end) { cpu::frames_of_spectrum(p, begin, end); }, together);
}

// out = high + L(low - high) and, where it is asked for, rest = low - L(low).
void filter(const char* op, const Tensor& low, const Tensor* high, const Tensor& out, const Tensor* rest,
            const Filter& filter) {
  if (low.numel() == 0)
    return;
  const Spectrum sizes(op, low);
  const std::vector<float> gains = sizes.gains(filter);
  with_type({op, "low", low}, [&](auto type) {
    using T = decltype(type);
    SpectralBlendParams<T> params{};
    params.time = &sizes.time;
    params.rows = &sizes.rows;
    params.columns = &sizes.columns;
    params.gain = gains.data();
    params.plane = sizes.height * sizes.width;
    params.strip = spectral_strip(sizes.frames);
    params.pitch = spectral_pitch(sizes.width);
    params.padded = blocks_of(params.plane, 2 * params.strip) * 2 * params.strip;
    const int64_t size = sizes.frames * params.plane, volumes = low.numel() / size;
    const auto filter_volumes = [&](int64_t begin, int64_t end) {
      SpectralBlendParams<T> volume = params;
      const std::unique_ptr<float[]> spectrum(new float[(sizes.frames / 2 + 1) * 2 * params.padded]);
      volume.spectrum = spectrum.get();
      for (int64_t at = begin * size; at < end * size; at += size) {
        volume.low = read<T>(low) + at;
        volume.high = high == nullptr ? nullptr : read<T>(*high) + at;
        volume.out = write<T>(out) + at;
        volume.rest = rest == nullptr ? nullptr : write<T>(*rest) + at;
        filter_volume(volume);
      }
    };
    // Where there are plenty, a thread takes whole volumes, and threads wait for each other once.
    if (volumes >= 4 * (int64_t)torch::stable::get_num_threads())
      for_items(volumes, 32 * size, filter_volumes);
    else
      filter_volumes(0, volumes);
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
  filter(op, mine, &other, out, nullptr, {cutoff_space, cutoff_time, butterworth_order});
  return out;
}

std::tuple<Tensor, Tensor> spectral_blend_backward(const Tensor& grad, double cutoff_space,
                                                   double cutoff_time, int64_t butterworth_order) {
  const char* op = "spectral_blend_backward";
  check_video({op, "grad", grad});
  const Tensor upstream = dense(grad), low = empty_dense(grad), high = empty_dense(grad);
  filter(op, upstream, nullptr, low, &high, {cutoff_space, cutoff_time, butterworth_order});
  return {low, high};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("spectral_blend", TORCH_BOX(&spectral_blend));
  m.impl("spectral_blend_backward", TORCH_BOX(&spectral_blend_backward));
}

} // namespace kvkeye
