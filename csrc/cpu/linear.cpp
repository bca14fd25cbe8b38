// Matrix product with one order of summation for every number of rows, and what follows it in a layer.
//
// An item is a block of rows times a few panels of outputs. It walks over the inputs in chunks: the block's
// inputs are widened once, each panel's weights are brought into the form that the tile multiplies, and the
// tiles add their sums to totals that stay in the second-level cache.
#include "kvkeye/linear.h"
#include "activation_math.h"
#include "linear_load.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kRows = LinearParams<float>::kRowBlock, kPanels = LinearParams<float>::kGroupPanels;

template <class T> constexpr int kPerWord = 4 / (int)sizeof(T);
template <class T> constexpr int words_of(int count) {
  return (count + kPerWord<T> - 1) / kPerWord<T>;
}

constexpr int kFewRows = 2 * kTileRows; // one tile
constexpr int kAhead = 32;              // words between what a stream reads and what it asks for

struct alignas(64) Scratch {
  float x[kRows * kInputChunk];
  float weight[kInputChunk * kPanel], widened[kInputChunk * kPanel];
  float total[kPanels][kRows * kPanel];
};

struct Range {
  int64_t first;
  int count;
};

Range range_of(int64_t index, int64_t block, int64_t size) {
  const int64_t first = index * block, left = size - first;
  return {first, (int)(left < block ? left : block)};
}

template <class T> struct Item {
  const LinearParams<T>& p;
  Scratch& scratch;
  Range rows, blocks;
};

template <class Product, class T> void load_block(const Item<T>& item, int64_t k, int count) {
  for (int m = 0; m < item.rows.count; ++m)
    load_inputs<T, Product>(item.p.x + (item.rows.first + m) * item.p.x_stride + k, count,
                            item.scratch.x + m * kInputChunk);
}

// Where a panel's weights lie: `panel` counts the panels of the item.
template <class T> struct Panel {
  const T* packed; // or null
  PanelRows<T> rows;
  int64_t stride;

  static Panel of(const Item<T>& item, int panel) {
    const LinearParams<T>& p = item.p;
    const int64_t block = item.blocks.first + panel / p.parts(), part = panel % p.parts();
    if (p.packed)
      return {p.weight + (block * p.parts() + part) * p.words() * kPanel * kPerWord<T>, {}, 0};
    const T* first = p.weight + (part * p.outputs + block * kPanel) * p.weight_stride;
    return {nullptr, PanelRows<T>::at(first, p.weight_stride, p.outputs - block * kPanel), p.weight_stride};
  }

  // Inputs [k, k + count) as words, in place or made in `copy`.
  const float* words(int64_t k, int count, float* copy) const {
    if (packed != nullptr)
      return (const float*)packed + k / kPerWord<T> * kPanel;
    PanelRows<T>::pack(rows, k, count, copy);
    return copy;
  }

  Upcoming upcoming(int64_t k) const {
    constexpr int lines = kInputChunk * sizeof(T) / 64;
    if (packed != nullptr)
      return {(const char*)(packed + k * kPanel), kPanel * 4, kInputChunk / kPerWord<T>, kPanel * 4 / 64};
    return {(const char*)(rows.row[0] + k), stride * (int64_t)sizeof(T), kPanel, lines};
  }
};

// Every panels-th row of the block, from the panel-th on.
template <class T> Upcoming upcoming_inputs(const Item<T>& item, int64_t k, int panel, int panels) {
  const T* first = item.p.x + (item.rows.first + panel) * item.p.x_stride + k;
  return {(const char*)first, item.p.x_stride * (int64_t)sizeof(T) * panels,
          (item.rows.count - panel + panels - 1) / panels, kInputChunk * (int)sizeof(T) / 64};
}

KVKEYE_INLINE int chunk_at(int64_t k, int64_t inputs) {
  return inputs - k < kInputChunk ? (int)(inputs - k) : kInputChunk;
}

// Few rows: one panel after the other, each from its first word to its last. Product reads words as packed.
template <class Product, class T> void stream_panels(const Item<T>& item) {
  for (int panel = 0; panel < item.blocks.count * item.p.parts(); ++panel) {
    const Panel<T> weights = Panel<T>::of(item, panel);
    for (int64_t k = 0; k < item.p.inputs; k += kInputChunk) {
      const int count = chunk_at(k, item.p.inputs);
      load_block<Product>(item, k, count);
      const float* w = weights.words(k, count, item.scratch.weight);
      multiply_tile<Product, true, kFewRows>(item.scratch.x, w, words_of<T>(count), item.rows.count,
                                             item.scratch.total[panel], k == 0, w + kAhead * kPanel);
    }
  }
}

// Many rows: chunk by chunk, so that inputs are prepared once for all panels. Words of two bf16 that would be
// widened for every tile are widened here instead.
template <class Product, class T> void multiply_panels(const Item<T>& item) {
  const int panels = item.blocks.count * item.p.parts();
  Panel<T> weights[kPanels];
  for (int panel = 0; panel < panels; ++panel)
    weights[panel] = Panel<T>::of(item, panel);
  for (int64_t k = 0; k < item.p.inputs; k += kInputChunk) {
    const int count = chunk_at(k, item.p.inputs), words = words_of<T>(count);
    load_block<Product>(item, k, count);
    const bool more = k + kInputChunk < item.p.inputs;
    for (int panel = 0; panel < panels; ++panel) {
      const bool last = panel + 1 == panels;
      const Upcoming next = weights[last ? 0 : panel + 1].upcoming(last ? k + kInputChunk : k);
      const Upcoming inputs = more ? upcoming_inputs(item, k + kInputChunk, panel, panels) : Upcoming{};
      const float* w = weights[panel].words(k, count, item.scratch.weight);
      float* total = item.scratch.total[panel];
      if constexpr (Product::steps == 2) {
        widen_weights(w, words, item.scratch.widened);
        multiply_rows<Single>(item.scratch.x, item.scratch.widened, 2 * words, item.rows.count, total, k == 0,
                              next, inputs);
      } else {
        multiply_rows<Product>(item.scratch.x, w, words, item.rows.count, total, k == 0, next, inputs);
      }
    }
  }
}

template <class Product, class T> KVKEYE_INLINE void sum_products(const Item<T>& item) {
  if (item.rows.count <= kFewRows)
    stream_panels<Product>(item);
  else
    multiply_panels<Product>(item);
}

// total + bias as an op of its own would have stored it, then the epilogue.
template <class T> KVKEYE_INLINE void finish_row(const Item<T>& item, int m, int block) {
  const LinearParams<T>& p = item.p;
  const int parts = p.parts();
  const int64_t row = item.rows.first + m;
  const Range outputs = range_of(item.blocks.first + block, kPanel, p.outputs);
  const float* total = item.scratch.total[block * parts] + m * kPanel;
  const float* up = item.scratch.total[block * parts + parts - 1] + m * kPanel;
  T* y = p.y + row * p.outputs + outputs.first;
  for_vectors(outputs.count, [&](int64_t o, int lanes) KVKEYE_LAMBDA {
    const int64_t output = outputs.first + o;
    Vf value = load(total + o) + (p.bias == nullptr ? Vf{} : load(p.bias + output, lanes));
    if (p.epilogue != Epilogue::none)
      value = rounded<T>(value);
    if (p.epilogue == Epilogue::add)
      value = load(p.residual + row * p.residual_stride + output, lanes) + value;
    else if (p.epilogue == Epilogue::silu_mul)
      value = silu_mul_value(value, rounded<T>(load(up + o)));
    else if (p.epilogue != Epilogue::none)
      value = gelu_value(value, p.epilogue == Epilogue::gelu_tanh);
    store(y + o, value, lanes);
  });
}

template <class T> void finish(const Item<T>& item) {
  for (int m = 0; m < item.rows.count; ++m)
    for (int block = 0; block < item.blocks.count; ++block)
      finish_row(item, m, block);
}

template <class T> void run(const Item<T>& item) {
  if (item.p.inputs == 0)
    std::memset(item.scratch.total, 0, sizeof item.scratch.total);
  if constexpr (sizeof(T) == 4) {
    sum_products<Single>(item);
  } else {
#if defined(__AVX512BF16__)
    if (item.p.paired)
      sum_products<Paired>(item);
    else
#endif
      sum_products<Widened>(item);
  }
  finish(item);
}

} // namespace

template <class T> void linear(const LinearParams<T>& p, int64_t begin, int64_t end) {
  Scratch scratch;
  for (int64_t i = begin; i < end; ++i)
    run(Item<T>{p, scratch, range_of(i / p.groups(), p.row_block, p.rows),
                range_of(i % p.groups(), p.block_group, p.blocks())});
}

template <class T> void pack_weight(const PackWeightParams<T>& p, int64_t begin, int64_t end) {
  alignas(64) float words[kInputChunk * kPanel];
  for (int64_t i = begin; i < end; ++i) {
    const Range outputs = range_of(i / p.parts, kPanel, p.outputs);
    const auto rows = PanelRows<T>::at(p.weight + (i % p.parts * p.outputs + outputs.first) * p.weight_stride,
                                       p.weight_stride, outputs.count);
    for (int64_t k = 0; k < p.inputs; k += kInputChunk) {
      const int count = chunk_at(k, p.inputs);
      PanelRows<T>::pack(rows, k, count, words);
      for (int word = 0; word < words_of<T>(count); ++word)
        for (int o = outputs.count; o < kPanel; ++o)
          words[word * kPanel + o] = 0.0f;
      std::memcpy((float*)p.packed + (i * p.words() + k / kPerWord<T>)*kPanel, words,
                  sizeof(float) * kPanel * words_of<T>(count));
    }
  }
}

KVKEYE_INSTANTIATE(linear, LinearParams)
KVKEYE_INSTANTIATE(pack_weight, PackWeightParams)

} // namespace kvkeye::KVKEYE_ISA
