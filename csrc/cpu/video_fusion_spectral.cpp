// The Gaussian of spectral_blend: planes while they lie in a core's cache, then frames, strip by strip.
#include "kvkeye/video_fusion_spectral.h"
#include "attention_product.h"

namespace kvkeye::KVKEYE_ISA {

// volume[t] = over_height (low - high)[t] over_width.
template <class T> void filter_planes(const SpectralBlendParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  const int64_t size = p.height * p.padded;
  float *plane = arena.take(size), *filtered = arena.take(size);
  for (int64_t frame = begin; frame < end; ++frame) {
    for (int64_t row = 0; row < p.height; ++row) {
      const int64_t at = (frame * p.height + row) * p.width;
      float* target = plane + row * p.padded;
      for_vectors(p.width, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
        const Vf low = load(p.low + at + i, lanes);
        store(target + i, p.high == nullptr ? low : low - load(p.high + at + i, lanes), lanes);
      });
    }
    multiply<false>({plane, p.padded, 1}, p.over_width, p.padded, filtered, p.padded, p.height, p.width,
                    p.padded);
    multiply<false>({p.over_height, p.height, 1}, filtered, p.padded, p.volume + frame * size, p.padded,
                    p.height, p.height, p.padded);
  }
}

// Strips of kStripColumns of the plane's padded rows.
template <class T> void filter_frames(const SpectralBlendParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  float* strip = arena.take(p.frames * kStripColumns);
  const int64_t size = p.height * p.padded;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * kStripColumns;
    const int64_t columns = size - first < kStripColumns ? size - first : kStripColumns;
    multiply<false>({p.over_time, p.frames, 1}, p.volume + first, size, strip, kStripColumns, p.frames,
                    p.frames, columns);
    for (int64_t frame = 0; frame < p.frames; ++frame)
      for (int64_t column = 0; column < columns;) {
        // A piece of one row, less what pads it.
        const int64_t row = (first + column) / p.padded, x = (first + column) % p.padded;
        const int64_t piece = p.padded - x < columns - column ? p.padded - x : columns - column;
        const int64_t inside = p.width - x < piece ? p.width - x : piece;
        const int64_t at = (frame * p.height + row) * p.width + x;
        const float* source = strip + frame * kStripColumns + column;
        for_vectors(inside > 0 ? inside : 0, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
          const Vf filtered = load(source + i, lanes);
          store(p.out + at + i, p.high == nullptr ? filtered : filtered + load(p.high + at + i, lanes),
                lanes);
          if (p.rest != nullptr)
            store(p.rest + at + i, load(p.low + at + i, lanes) - filtered, lanes);
        });
        column += piece;
      }
  }
}

KVKEYE_INSTANTIATE(filter_planes, SpectralBlendParams)
KVKEYE_INSTANTIATE(filter_frames, SpectralBlendParams)

} // namespace kvkeye::KVKEYE_ISA
