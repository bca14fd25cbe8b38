// Quantised matrix product: rows to levels, exact sums of their products, scales.
#include "kvkeye/int8_linear.h"
#include "linear_finish.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kChunk = kInputChunk<int8_t>;

// From here on bits are not those of a finite number.
constexpr int32_t kInfinityBits = 0x7f800000;

struct Levels {
  float scale, inverse;
};

KVKEYE_INLINE int32_t largest_bits(Vi bits) {
  int32_t lane[kLanes], found = 0;
  std::memcpy(lane, &bits, sizeof bits);
  for (int i = 0; i < kLanes; ++i)
    found = lane[i] > found ? lane[i] : found;
  return found;
}

// Magnitudes compare as their bits do, and a NaN is the largest.
template <class T> KVKEYE_INLINE Levels levels_of(const T* x, int64_t count) {
  Vi most{};
  for_vectors(count, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vi bits = (Vi)load(x + i, lanes) & 0x7fffffff;
    most = bits > most ? bits : most;
  });
  const int32_t bits = largest_bits(most);
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof bits);
  if (bits >= kInfinityBits)
    return {__builtin_nanf(""), 0.0f};
  if (magnitude < kLeastMagnitude)
    return {0.0f, 0.0f};
  return {magnitude * (1.0f / kMaxLevel), 1.0f / magnitude * kMaxLevel};
}

typedef int8_t Vc __attribute__((vector_size(kLanes)));

// x / scale to the nearest integers, ties to even; returns their sum. Where the scale is none they are zero.
template <class T> KVKEYE_INLINE int32_t quantize(const T* x, int64_t count, float inverse, int8_t* levels) {
  if (inverse == 0.0f) {
    std::memset(levels, 0, count);
    return 0;
  }
  const Vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  Vi sum{};
  for_vectors(count, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    const Vi level = (Vi)(load(x + i, lanes) * inverse + magic) - (Vi)magic;
    const Vc narrow = __builtin_convertvector(level, Vc);
    std::memcpy(levels + i, &narrow, lanes);
    sum += level;
  });
  int32_t lane[kLanes], total = 0;
  std::memcpy(lane, &sum, sizeof sum);
  for (int i = 0; i < kLanes; ++i)
    total += lane[i];
  return total;
}

template <class T> void finish(const Item<Int8LinearParams<T>>& item, int panel, const Part& rows) {
  const Int8LinearParams<T>& p = item.p;
  finish_rows(item, panel, rows,
              [&](const float* total, int64_t row, int64_t output, int lanes) KVKEYE_LAMBDA {
                typename QuantizeRowsParams<T>::Scale of_row;
                std::memcpy(&of_row, p.x + row * p.x_stride + p.record_levels, sizeof of_row);
                const Vi sum = (Vi)load(total) - kZeroLevel * of_row.sum;
                return __builtin_convertvector(sum, Vf) * of_row.scale * load(p.scales + output, lanes);
              });
}

} // namespace

template <class T> void quantize_rows(const QuantizeRowsParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.x_stride;
    int8_t* record = p.records + row * p.record_bytes();
    const Levels levels = levels_of(x, p.inputs);
    const typename QuantizeRowsParams<T>::Scale scale{levels.scale,
                                                      quantize(x, p.inputs, levels.inverse, record)};
    std::memset(record + p.inputs, 0, p.record_levels - p.inputs);
    std::memcpy(record + p.record_levels, &scale, sizeof scale);
  }
}

// Level 0 fills the edges.
template <class T> void quantize_weight(const QuantizeWeightParams<T>& p, int64_t begin, int64_t end) {
  alignas(64) int8_t levels[kPanel][kChunk];
  alignas(64) float words[kChunkWords * kPanel];
  Levels of_output[kPanel];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = i / p.parts * kPanel, left = p.outputs - first,
                  row = i % p.parts * p.outputs + first;
    const int count = (int)(left < kPanel ? left : kPanel);
    const T* weight = p.weight + row * p.weight_stride;
    for (int o = 0; o < count; ++o) {
      of_output[o] = levels_of(weight + o * p.weight_stride, p.inputs);
      p.scales[row + o] = of_output[o].scale;
    }
    for (int64_t k = 0; k < p.inputs; k += kChunk) {
      const int inputs = chunk_at<int8_t>(k, p.inputs);
      std::memset(levels, 0, sizeof levels);
      for (int o = 0; o < count; ++o)
        quantize(weight + o * p.weight_stride + k, inputs, of_output[o].inverse, levels[o]);
      for (auto& output : levels)
        for (int8_t& level : output)
          level ^= (int8_t)kZeroLevel;
      PanelRows<int8_t>::pack(PanelRows<int8_t>::at(levels[0], kChunk, kPanel), 0, kChunk, words);
      std::memcpy((float*)p.packed + (i * p.words() + k / 4) * kPanel, words,
                  sizeof(float) * kPanel * words_of<int8_t>(inputs));
    }
  }
}

template <class T> void int8_linear(const Int8LinearParams<T>& p, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t i = begin; i < end; ++i) {
    const auto item = Item<Int8LinearParams<T>>::of(p, scratch, i);
    multiply_item<Int8Quads>(item,
                             [&](int panel, const Part& rows) KVKEYE_LAMBDA { finish(item, panel, rows); });
  }
}

KVKEYE_INSTANTIATE(quantize_rows, QuantizeRowsParams)
KVKEYE_INSTANTIATE(quantize_weight, QuantizeWeightParams)
KVKEYE_INSTANTIATE(int8_linear, Int8LinearParams)

} // namespace kvkeye::KVKEYE_ISA
