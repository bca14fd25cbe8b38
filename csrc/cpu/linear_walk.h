// The walk of an item over its inputs, for every type of operand.
//
// As many chunks of the block's inputs as fit are brought into the form that tiles multiply. Each panel walks
// over them from end to end of its weights, and tiles add their sums to totals in the second-level cache.
// What comes next from memory is asked for meanwhile: the caches have the time of all tiles to bring it. With
// the last chunk a tile's outputs are finished at once.
#pragma once

#include "linear_load.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kRows = LinearCut::kRowBlock, kPanels = LinearCut::kGroupPanels;
constexpr int kChunkWords = 128;   // of the widest type
constexpr int kInputWords = 24576; // of the rows of an item, 96 KB
constexpr int kWaiting = 5;        // rows whose products take less time than reading their weights

template <class T> constexpr int kPerWord = 4 / (int)sizeof(T);
template <class T> constexpr int words_of(int count) {
  return (count + kPerWord<T> - 1) / kPerWord<T>;
}

struct alignas(64) Scratch {
  float x[kInputWords];
  float weight[kChunkWords * kPanel], widened[kChunkWords * kPanel];
  float total[kPanels][kRows * kPanel];
};

template <class Params> struct Item {
  const Params& p;
  Scratch& scratch;
  int64_t index;
  Part rows, blocks;

  static Item of(const Params& p, Scratch& scratch, int64_t index) {
    return {p, scratch, index, p.rows_of(index), p.blocks_of_item(index)};
  }
  int panels() const { return (int)blocks.count * p.parts(); }
};

// What memory brings while a chunk of a panel is multiplied: packed weights from `packed` on, or rows of
// plain ones; and inputs.
struct Ahead {
  const char* packed; // or null
  Upcoming plain, inputs;
};

// Where a panel's weights lie: `panel` counts the panels of the item.
template <class Params> struct Panel {
  using T = typename Params::Input;
  const T* packed; // or null
  PanelRows<T> rows;
  int64_t stride;

  static Panel of(const Item<Params>& item, int panel) {
    const Params& p = item.p;
    const int64_t block = item.blocks.first + panel / p.parts(), part = panel % p.parts();
    if (p.packed) {
      const int64_t words = blocks_of(p.inputs, kPerWord<T>);
      return {p.weight + (block * p.parts() + part) * words * kPanel * kPerWord<T>, {}, 0};
    }
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

  // Few rows leave it to the hardware, which sees one stream: they wait for memory alone.
  Ahead ahead(int64_t k, int64_t rows) const {
    if (packed != nullptr)
      return {rows <= kWaiting ? nullptr : (const char*)(packed + k * kPanel), {}, {}};
    const char* first = (const char*)(this->rows.row[0] + k);
    return {nullptr, {first, stride * (int64_t)sizeof(T), kPanel, kInputChunk<T> * (int)sizeof(T) / 64}, {}};
  }
};

template <class T> KVKEYE_INLINE int chunk_at(int64_t k, int64_t inputs) {
  return inputs - k < kInputChunk<T> ? (int)(inputs - k) : kInputChunk<T>;
}

// Inputs of an item in the form of Product: `chunks` chunks from k on, the rows of a chunk together.
template <class Product, class Params> struct Block {
  using T = typename Params::Input;
  const Item<Params>& item;
  int64_t k;
  int chunks;

  static Block at(const Item<Params>& item, int64_t k) {
    const int64_t fit = kInputWords / (item.rows.count * Product::row_words);
    const int64_t left = blocks_of(item.p.inputs - k, kInputChunk<T>);
    return {item, k, (int)(left < fit ? left : fit)};
  }
  float* chunk(int c) const { return item.scratch.x + c * item.rows.count * Product::row_words; }
  int64_t end() const { return k + (int64_t)chunks * kInputChunk<T>; }

  void load() const {
    for (int c = 0; c < chunks; ++c) {
      const int64_t first = k + (int64_t)c * kInputChunk<T>;
      for (int64_t m = 0; m < item.rows.count; ++m)
        load_inputs<T, Product>(item.p.x + (item.rows.first + m) * item.p.x_stride + first,
                                chunk_at<T>(first, item.p.inputs), chunk(c) + m * Product::row_words);
    }
  }

  // Of the block after this one, what memory brings while panel `panel` of `panels` is multiplied.
  Upcoming upcoming(int panel, int panels) const {
    if (end() >= item.p.inputs)
      return {};
    const T* first = item.p.x + (item.rows.first + panel) * item.p.x_stride + end();
    return {(const char*)first, item.p.x_stride * (int64_t)sizeof(T) * panels,
            (int)(item.rows.count - panel + panels - 1) / panels,
            chunks * kInputChunk<T> * (int)sizeof(T) / 64};
  }
};

// One chunk of one panel, tile by tile.
template <class Product, class Finish>
KVKEYE_INLINE void multiply_chunk(int64_t rows, const float* x, const float* w, int words, float* total,
                                  bool first, const Ahead& ahead, const Finish& finish) {
  const int tiles = (int)blocks_of(rows, kTileRows);
  constexpr int asking = kPanel * 4 / 64; // lines of a word: tiles that ask for one each, or one for all
  for (int tile = 0; tile < tiles; ++tile) {
    const Part part = Part::of(tile, tiles, rows);
    const float* from = x + part.first * Product::row_words;
    float* sums = total + part.first * kPanel;
    Upcoming::fetch(ahead.plain, tile, tiles);
    Upcoming::fetch(ahead.inputs, tile, tiles);
    if (ahead.packed == nullptr || tile >= asking)
      multiply_tile<Product, 0>(from, w, words, (int)part.count, sums, first, nullptr);
    else if (tiles == 1)
      multiply_tile<Product, asking>(from, w, words, (int)part.count, sums, first, ahead.packed);
    else
      multiply_tile<Product, 1>(from, w, words, (int)part.count, sums, first,
                                ahead.packed + tile * words * 64);
    finish(part);
  }
}

// Weights of two steps are widened once where several tiles share them.
template <class Product, class Finish>
KVKEYE_INLINE void multiply_words(int64_t rows, const float* x, const float* w, int words, float* total,
                                  bool first, const Ahead& ahead, float* widened, const Finish& finish) {
  if constexpr (Product::steps == 2) {
    if (rows > 2 * kTileRows) {
      widen_weights<Product>(w, words, widened);
      const Ahead others{nullptr, ahead.plain, ahead.inputs};
      return multiply_chunk<typename Product::Wide>(rows, x, widened, 2 * words, total, first, others,
                                                    finish);
    }
  }
  multiply_chunk<Product>(rows, x, w, words, total, first, ahead, finish);
}

// Calls finish(panel, rows) for rows of a panel whose totals are whole.
template <class Product, class Params, class Finish>
void multiply_item(const Item<Params>& item, const Finish& finish) {
  using T = typename Params::Input;
  const int panels = item.panels();
  const int64_t inputs = item.p.inputs, rows = item.rows.count;
  Panel<Params> weights[kPanels];
  for (int panel = 0; panel < panels; ++panel)
    weights[panel] = Panel<Params>::of(item, panel);
  for (int64_t begin = 0; begin < inputs;) {
    const auto block = Block<Product, Params>::at(item, begin);
    block.load();
    begin = block.end();
    for (int panel = 0; panel < panels; ++panel)
      for (int c = 0; c < block.chunks; ++c) {
        const int64_t k = block.k + (int64_t)c * kInputChunk<T>;
        const int count = chunk_at<T>(k, inputs), words = words_of<T>(count);
        const bool goes_on = c + 1 < block.chunks, last = panel + 1 == panels;
        const Panel<Params>& after = weights[goes_on ? panel : last ? 0 : panel + 1];
        const int64_t k_after = goes_on ? k + kInputChunk<T> : last ? block.end() : block.k;
        Ahead ahead = after.ahead(k_after, rows);
        if (c == 0)
          ahead.inputs = block.upcoming(panel, panels);
        const bool whole = k + kInputChunk<T> >= inputs;
        multiply_words<Product>(rows, block.chunk(c), weights[panel].words(k, count, item.scratch.weight),
                                words, item.scratch.total[panel], k == 0, ahead, item.scratch.widened,
                                [&](const Part& part) KVKEYE_LAMBDA {
                                  if (whole)
                                    finish(panel, part);
                                });
      }
  }
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
