// spectral_blend: strips of pixels through time, planes of frequencies through space, strips back.
#include "kvkeye/video_fusion_spectral.h"
#include "attention_product.h"
#include "fft.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

KVKEYE_INLINE int lanes_of(int64_t left) {
  return left < kLanes ? (int)left : kLanes;
}

// to[c, r] = from[r, c] for r < rows and c < columns. With kWhole the rows of `to` have room for whole
// vectors, which end in zeros.
template <bool kWhole>
KVKEYE_APART void transpose_part(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                                 float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int down = lanes_of(rows - r), across = lanes_of(columns - c);
      const float* source = from + r * from_row + c;
      float* target = to + c * to_row + r;
      Vf tile[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        tile[i] = i < down ? load(source + i * from_row, across) : Vf{};
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < across)
          store(target + i * to_row, tile[i], kWhole ? kLanes : down);
    }
}

template <bool kWhole>
KVKEYE_INLINE void transpose(const Columns& from, int64_t rows, int64_t columns, const Columns& to) {
  transpose_part<kWhole>(from.re, from.row, rows, columns, to.re, to.row);
  transpose_part<kWhole>(from.im, from.row, rows, columns, to.im, to.row);
}

// A strip of pixels against all frames; `partner` is the other of its pair.
template <class T> Columns strips(const SpectralBlendParams<T>& p, Arena& arena) {
  const int64_t size = p.time->size * p.strip;
  float *strip = arena.take(size), *partner = arena.take(size);
  return {strip, partner, p.strip, (int)(p.strip / kLanes)};
}

// body(row, offset in it, pixel, lanes) over a strip's pixels inside the plane, frame by frame.
template <class T, class Body>
KVKEYE_INLINE void for_pixels(const SpectralBlendParams<T>& p, int64_t first, float* strip, Body body) {
  const int64_t inside = first >= p.plane ? 0 : first + p.strip <= p.plane ? p.strip : p.plane - first;
  for (int64_t frame = 0; frame < p.time->size; ++frame)
    for_vectors(inside, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      body(strip + frame * p.strip + i, frame * p.plane + first + i, lanes);
    });
}

// What the next pair of strips reads: frames lie a plane apart, which no hardware prefetcher follows.
template <class T> KVKEYE_INLINE void prefetch_next(const SpectralBlendParams<T>& p, const T* pixel) {
  __builtin_prefetch(pixel + 2 * p.strip);
}

} // namespace

template <class T> void spectrum_of_frames(const SpectralBlendParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  const Columns z = strips(p, arena);
  const FftPlan& time = *p.time;
  const auto gather = [&](float* strip, int64_t at, int lanes) KVKEYE_LAMBDA {
    Vf value = load(p.low + at, lanes);
    prefetch_next(p, p.low + at);
    if (p.high != nullptr) {
      value -= load(p.high + at, lanes);
      prefetch_next(p, p.high + at);
    }
    store(strip, value, lanes);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * 2 * p.strip;
    if (first + 2 * p.strip > p.plane) { // columns beyond the plane are partners too
      std::memset(z.re, 0, time.size * p.strip * sizeof(float));
      std::memset(z.im, 0, time.size * p.strip * sizeof(float));
    }
    for_pixels(p, first, z.re, gather);
    for_pixels(p, first + p.strip, z.im, gather);
    transform(time, z);
    // Z = A + i B of two real columns: twice A is Z + Z', twice B is (Z - Z') / i, with Z' = conj Z[-k].
    for (int64_t k = 0; k <= time.size / 2; ++k) {
      const int64_t at = time.place[k] * p.strip, mirrored = time.place[k ? time.size - k : 0] * p.strip;
      float* re = p.spectrum + k * 2 * p.padded + first;
      float* im = re + p.padded;
      for (int64_t i = 0; i < p.strip; i += kLanes) {
        const Vf z_re = load(z.re + at + i), z_im = load(z.im + at + i);
        const Vf m_re = load(z.re + mirrored + i), m_im = load(z.im + mirrored + i);
        store(re + i, z_re + m_re);
        store(im + i, z_im - m_im);
        store(re + p.strip + i, z_im + m_im);
        store(im + p.strip + i, m_re - z_re);
      }
    }
  }
}

template <class T> void filter_spectrum(const SpectralBlendParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  const int64_t width = p.columns->size, height = p.rows->size, size = height * p.pitch;
  const Columns plane{arena.take(size), arena.take(size), p.pitch, 1};
  const Columns lines{arena.take(width * kLanes), arena.take(width * kLanes), kLanes, 1};
  for (int64_t item = begin; item < end; ++item) {
    float* first = p.spectrum + item * 2 * p.padded;
    const Columns spectrum{first, first + p.padded, width, 1};
    for (int64_t row = 0; row < height; row += kLanes) {
      const int count = lanes_of(height - row);
      transpose<true>(spectrum.from(row * width), count, width, lines);
      transform(*p.columns, lines);
      transpose<true>(lines, width, count, plane.from(row * p.pitch));
    }
    for (int64_t column = 0; column < width; column += kLanes) {
      const Columns strip = plane.from(column);
      const float* gain = p.gain + item * size + column;
      transform(*p.rows, strip);
      for (int64_t at = 0; at < size; at += p.pitch) {
        const Vf factor = load(gain + at);
        store(strip.re + at, factor * load(strip.re + at));
        store(strip.im + at, factor * load(strip.im + at));
      }
      transform_back(*p.rows, strip);
    }
    for (int64_t row = 0; row < height; row += kLanes) {
      const int count = lanes_of(height - row);
      transpose<true>(plane.from(row * p.pitch), count, width, lines);
      transform_back(*p.columns, lines);
      transpose<false>(lines, width, count, spectrum.from(row * width));
    }
  }
}

template <class T> void frames_of_spectrum(const SpectralBlendParams<T>& p, int64_t begin, int64_t end) {
  Arena arena(p.scratch);
  const Columns z = strips(p, arena);
  const FftPlan& time = *p.time;
  const auto scatter = [&](float* strip, int64_t at, int lanes) KVKEYE_LAMBDA {
    const Vf filtered = load(strip, lanes);
    Vf value = filtered;
    if (p.high != nullptr) {
      value += load(p.high + at, lanes);
      prefetch_next(p, p.high + at);
    }
    store(p.out + at, value, lanes);
    if (p.rest != nullptr)
      store(p.rest + at, load(p.low + at, lanes) - filtered, lanes);
  };
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item * 2 * p.strip;
    for (int64_t k = 0; k <= time.size / 2; ++k) {
      const int64_t at = time.place[k] * p.strip, mirrored = time.place[k ? time.size - k : 0] * p.strip;
      const float* re = p.spectrum + k * 2 * p.padded + first;
      const float* im = re + p.padded;
      for (int64_t i = 0; i < p.strip; i += kLanes) {
        const Vf a_re = load(re + i), a_im = load(im + i);
        const Vf b_re = load(re + p.strip + i), b_im = load(im + p.strip + i);
        store(z.re + at + i, a_re - b_im); // A + i B, and conj A + i conj B
        store(z.im + at + i, a_im + b_re);
        store(z.re + mirrored + i, a_re + b_im);
        store(z.im + mirrored + i, b_re - a_im);
      }
    }
    transform_back(time, z);
    for_pixels(p, first, z.re, scatter);
    for_pixels(p, first + p.strip, z.im, scatter);
  }
}

KVKEYE_INSTANTIATE(spectrum_of_frames, SpectralBlendParams)
KVKEYE_INSTANTIATE(filter_spectrum, SpectralBlendParams)
KVKEYE_INSTANTIATE(frames_of_spectrum, SpectralBlendParams)

} // namespace kvkeye::KVKEYE_ISA
