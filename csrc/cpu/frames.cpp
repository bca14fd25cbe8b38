// Hue, saturation and value in OpenCV's 8-bit fixed point, and products of patches, both exact.
#include "kvkeye/frames.h"
#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

typedef uint8_t Vb __attribute__((vector_size(kLanes)));

// Neighbouring pixels, one lane each; levels and what comes of them are whole numbers below 2^24.
struct Pixels {
  Vf red, green, blue;
};

#if defined(__AVX512F__)
KVKEYE_INLINE Pixels load_pixels(const uint8_t* source, int count) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(((uint64_t)1 << (3 * count)) - 1, source);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first = _mm512_add_epi32(lane, _mm512_add_epi32(lane, lane)); // byte 3 i for lane i
  const auto channel = [&](int offset) KVKEYE_LAMBDA {
    const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(offset));
    const __m512i moved =
        _mm512_maskz_permutexvar_epi8(~(uint64_t)0, index, bytes); // the upper bytes are dropped
    return __builtin_convertvector((Vi)moved & 255, Vf);
  };
  return {channel(0), channel(1), channel(2)};
}
#else
KVKEYE_INLINE Pixels load_pixels(const uint8_t* source, int count) {
  float channel[3][kLanes] = {};
  for (int i = 0; i < count; ++i)
    for (int c = 0; c < 3; ++c)
      channel[c][i] = (float)source[3 * i + c];
  return {load(channel[0]), load(channel[1]), load(channel[2])};
}
#endif

KVKEYE_INLINE void store_levels(uint8_t* target, Vf level, int count) {
  const Vi whole = __builtin_convertvector(level, Vi);
#if defined(__AVX512F__)
  _mm512_mask_cvtepi32_storeu_epi8(target, (__mmask16)((1u << count) - 1), (__m512i)whole);
#else
  const Vb bytes = __builtin_convertvector(whole, Vb);
  std::memcpy(target, &bytes, count);
#endif
}

// part * round(steps * 2^12 / whole) / 2^12, rounded down after adding a half. fp32 is exact here: the
// quotient of whole numbers rounds like the true one (checked for every divisor), products stay below 2^24.
KVKEYE_INLINE Vf fixed_point(Vf part, float steps, Vf whole) {
  const float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
  const Vf reciprocal = (steps * 4096.0f / max(whole, splat(1.0f)) + magic) - magic;
  const Vf shifted = part * reciprocal * 0x1p-12f + 256.5f; // positive, so that cutting rounds down
  return __builtin_convertvector(__builtin_convertvector(shifted, Vi), Vf) - 256.0f;
}

KVKEYE_INLINE void store_hsv(const Pixels& rgb, uint8_t* target, int64_t plane, int count) {
  const Vf value = max(max(rgb.red, rgb.green), rgb.blue);
  const Vf spread = value - min(min(rgb.red, rgb.green), rgb.blue);
  const Vf by_green =
      value == rgb.green ? rgb.blue - rgb.red + 2.0f * spread : rgb.red - rgb.green + 4.0f * spread;
  const Vf hue = fixed_point(value == rgb.red ? rgb.green - rgb.blue : by_green, 30.0f, spread);
  store_levels(target, hue < 0.0f ? hue + 180.0f : hue, count);
  store_levels(target + plane, fixed_point(spread, 255.0f, value), count);
  store_levels(target + 2 * plane, value, count);
}

// A chunk's sum fits 32 bits: 2^14 products of at most 255 * 255.
constexpr int64_t kChunk = 1 << 14;

KVKEYE_INLINE int64_t product(const uint8_t* a, const uint8_t* b, int64_t size) {
  int64_t total = 0;
  for (int64_t first = 0; first < size; first += kChunk) {
    const int64_t end = first + kChunk < size ? first + kChunk : size;
    int32_t part = 0;
    for (int64_t i = first; i < end; ++i)
      part += (int16_t)a[i] * (int16_t)b[i];
    total += part;
  }
  return total;
}

} // namespace

void hsv_patches(const HsvPatchesParams& p, int64_t begin, int64_t end) {
  const int64_t across = p.width / p.patch, plane = p.patch * p.patch;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < across; ++column) {
      const uint8_t* source = p.pixels + row * p.row_stride + 3 * column * p.patch;
      uint8_t* target = p.out + (row / p.patch * across + column) * 3 * plane + row % p.patch * p.patch;
      for_vectors(p.patch, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
        store_hsv(load_pixels(source + 3 * i, lanes), target + i, plane, lanes);
      });
    }
  }
}

void patch_products(const PatchProductsParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    p.out[row] = product(p.a + row * p.a_stride, p.b + row * p.b_stride, p.size);
}

} // namespace kvkeye::KVKEYE_ISA
