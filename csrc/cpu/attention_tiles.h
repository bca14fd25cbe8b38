// Attention in bf16 tiles (AMX): the rows lie in the lanes, keys and transposed values are the left factors.
//
// scores [keys, rows] = K [keys, dims] Q' [dims, rows], and out [dims, rows] += V' [dims, keys] P [keys,
// rows]: keys are read as they lie, queries and values are transposed once, and weights become pairs where
// they are.
#pragma once

#if defined(__AMX_BF16__)

#include "attention_lane_rows.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

constexpr int kTileVectors = 2; // 32 keys times 32 rows fill four of the eight tiles
constexpr int kTileLine = 32;   // bf16 of a tile's row

// The compiler does not know that a tile is read from memory, or written there.
KVKEYE_INLINE void memory_fence() {
  asm volatile("" ::: "memory");
}

// All tiles are 16 rows of 64 bytes, until release_tiles().
KVKEYE_INLINE void acquire_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  memory_fence();
  _tile_loadconfig(&shapes);
}

KVKEYE_INLINE void release_tiles() {
  _tile_release();
}

// c[32, 32] (+)= a[32, depth] b[depth, 32] for two vectors of rows. a: bf16, rows of a_row; b: pairs of
// neighbours in depth, [depth / 2, 16] words for each vector, the second b_next further on.
template <bool kAdd>
KVKEYE_APART void multiply_tiles(const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row,
                                 int64_t b_next, float* c, int64_t c_row, int64_t depth) {
  const int64_t below = 16 * c_row;
  memory_fence();
  if (kAdd) {
    _tile_loadd(0, c, c_row * 4);
    _tile_loadd(1, c + 16, c_row * 4);
    _tile_loadd(2, c + below, c_row * 4);
    _tile_loadd(3, c + below + 16, c_row * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileLine, b += 16 * b_row) {
    _tile_loadd(4, a + k, a_row * 2);
    _tile_loadd(6, b, b_row * 4);
    _tile_loadd(7, b + b_next, b_row * 4);
    _tile_loadd(5, a + 16 * a_row + k, a_row * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + 16, c_row * 4);
  _tile_stored(2, c + below, c_row * 4);
  _tile_stored(3, c + below + 16, c_row * 4);
  memory_fence();
}

// The same for 16 rows of a.
template <bool kAdd>
KVKEYE_APART void multiply_half_tiles(const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row,
                                      int64_t b_next, float* c, int64_t c_row, int64_t depth) {
  memory_fence();
  _tile_loadd(0, c, c_row * 4);
  _tile_loadd(1, c + 16, c_row * 4);
  for (int64_t k = 0; k < depth; k += kTileLine, b += 16 * b_row) {
    _tile_loadd(4, a + k, a_row * 2);
    _tile_loadd(6, b, b_row * 4);
    _tile_loadd(7, b + b_next, b_row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + 16, c_row * 4);
  memory_fence();
}

// c[64, 16] (+)= a[64, depth] b[depth, 16] for one vector of rows; blocks: how many of the four times 16
// rows.
template <bool kAdd>
KVKEYE_APART void multiply_column(const bf16* a, int64_t a_row, const uint32_t* b, int64_t b_row, float* c,
                                  int64_t c_row, int64_t depth, int blocks) {
  memory_fence();
  for (int block = 0; block < blocks; ++block, a += 16 * a_row, c += 16 * c_row) {
    if (kAdd)
      _tile_loadd(0, c, c_row * 4);
    else
      _tile_zero(0);
    for (int64_t k = 0; k < depth; k += kTileLine) {
      _tile_loadd(4, a + k, a_row * 2);
      _tile_loadd(6, b + k / 2 * b_row, b_row * 4);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, c, c_row * 4);
  }
  memory_fence();
}

template <class T, class Work> struct TileRows : LaneRows<Work, kTileVectors, true> {
  using Base = LaneRows<Work, kTileVectors, true>;
  using Base::dim, Base::groups, Base::kGroup, Base::max, Base::scores, Base::total, Base::width, Base::work;
  int64_t depth;     // dim in whole tile lines
  float scale;       // of the scores, positive; its sign goes to the queries
  uint32_t* q;       // [groups, kTileVectors, depth / 2, 16]: pairs of dimensions
  bf16* keys;        // [kTile, depth]
  bf16* values;      // [width, kTile]
  uint32_t* weights; // [kTile / 2, kGroup]: pairs of keys

  TileRows(const Work& of, int64_t head_dim, float softmax_scale, Arena arena)
      : Base(of, head_dim, arena), depth((head_dim + kTileLine - 1) / kTileLine * kTileLine),
        scale(softmax_scale == 0.0f ? 1.0f : fabsf(softmax_scale) * kLog2E) {
    q = (uint32_t*)arena.take(groups * kGroup * depth / 2);
    keys = (bf16*)arena.take(kTile * depth / 2);
    values = (bf16*)arena.take(width * kTile / 2);
    weights = (uint32_t*)arena.take(kTile / 2 * kGroup);
    for (int r = 0; r < groups * kGroup; r += 16)
      load_queries(r, softmax_scale);
    clear((float*)keys, kTile * depth / 2, 0.0f);
    clear((float*)values, width * kTile / 2, 0.0f);
  }

  void load_queries(int r, float softmax_scale) {
    const uint32_t sign = softmax_scale < 0.0f ? 0x80008000u : 0u, kept = softmax_scale == 0.0f ? 0u : ~0u;
    for (int64_t d = 0; d < depth; d += kTileLine) {
      Vf block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int row = this->row_of(r + i);
        block[i] = row >= 0 ? load_line(work.query(row) + d, dim - d) : Vf{};
        block[i] = (Vf)(((Vu)block[i] ^ sign) & kept);
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i)
        store((float*)q + (r * depth + d * 16) / 2 + i * 16, block[i]);
    }
  }

  // Up to a tile line of a row, zeros behind its end.
  static KVKEYE_LAMBDA Vf load_line(const T* source, int64_t count) {
    const __mmask32 mask = count >= kTileLine ? ~0u : count > 0 ? (1u << count) - 1 : 0u;
    return (Vf)_mm512_maskz_loadu_epi16(mask, source);
  }

  // All rows against positions [begin, end) of one split, of which nothing is read ahead.
  void attend(int64_t begin, int64_t end, int64_t, bool partial) {
    this->begin_split();
    const T *key_rows[kTile], *value_rows[kTile];
    for (int64_t start = begin; start < end; start += kTile) {
      const int columns = tile_columns(start, end), next = tile_columns(start + kTile, end);
      work.locate(start, columns, key_rows, value_rows);
      load_keys(key_rows, columns);
      load_values(value_rows, columns);
      work.locate(start + kTile, next, key_rows, value_rows);
      for (int group = 0; group < groups; ++group) {
        const int from = next * group / groups, to = next * (group + 1) / groups;
        prefetch_rows(key_rows + from, to - from, dim); // a few at a time: the core waits for no more lines
        prefetch_rows(value_rows + from, to - from, dim);
        attend_group(group, start, columns);
      }
    }
    for (int group = 0; group < groups; ++group)
      this->close(group, partial);
  }

  void load_keys(const T* const* rows, int columns) {
    for (int j = 0; j < columns; ++j)
      for (int64_t d = 0; d < depth; d += kTileLine)
        store((float*)(keys + j * depth + d), load_line(rows[j] + d, dim - d));
  }

  // Transposed: pairs of keys make words, which are transposed 16 by 16. Zeros behind the last key.
  KVKEYE_APART void load_values(const T* const* rows, int columns) {
    for (int j = 0; j < kTile; j += 2 * kLanes)
      for (int64_t d = 0; d < dim; d += kTileLine) {
        Vf low[kLanes], high[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int key = j + 2 * i;
          const __m512i even = (__m512i)(key < columns ? load_line(rows[key] + d, dim - d) : Vf{});
          const __m512i odd = (__m512i)(key + 1 < columns ? load_line(rows[key + 1] + d, dim - d) : Vf{});
          low[i] = (Vf)_mm512_unpacklo_epi16(even, odd);
          high[i] = (Vf)_mm512_unpackhi_epi16(even, odd);
        }
        transpose(low);
        transpose(high);
        for (int i = 0; i < kLanes; ++i) { // word i of a half belongs to this dimension:
          const int64_t at = d + i / 4 * 8 + i % 4;
          if (at < width)
            store((float*)(values + at * kTile + j), low[i]);
          if (at + 4 < width)
            store((float*)(values + (at + 4) * kTile + j), high[i]);
        }
      }
  }

  void attend_group(int group, int64_t start, int columns) {
    if (start >= this->most[group])
      return;
    const int vectors = this->vectors(group);
    const uint32_t* queries = q + group * kGroup * depth / 2;
    if (vectors == 2)
      for (int j = 0; j < kTile; j += 32)
        multiply_tiles<false>(keys + j * depth, depth, queries, 16, depth / 2 * 16, scores + j * kGroup,
                              kGroup, depth);
    else
      multiply_column<false>(keys, depth, queries, 16, scores, kGroup, depth, kTile / 16);
    float* sums = this->out + group * kGroup * width;
    for (int n = 0; n < vectors; ++n) {
      const int r = group * kGroup + n * kLanes;
      for (int64_t d = 0; d < width; ++d)
        __builtin_prefetch(sums + d * kGroup + n * kLanes, 1, 3);
      if (start + kTile > this->least[group])
        this->hide_unseen(r, start, columns);
      weigh(r);
    }
    int64_t d = 0;
    for (; vectors == 2 && d + 32 <= width; d += 32)
      multiply_tiles<true>(values + d * kTile, kTile, weights, kGroup, 16, sums + d * kGroup, kGroup, kTile);
    for (; vectors == 2 && d < width; d += 16)
      multiply_half_tiles<true>(values + d * kTile, kTile, weights, kGroup, 16, sums + d * kGroup, kGroup,
                                kTile);
    if (vectors == 1)
      multiply_column<true>(values, kTile, weights, kGroup, sums, kGroup, kTile, (int)(width / 16));
  }

  // Scores of rows [r, r + kLanes) become weights, in pairs of keys. The base follows the maximum only when
  // that has risen by more than 2^kSlack: outputs are then rescaled, which is rare.
  KVKEYE_APART void weigh(int r) {
    constexpr float kSlack = 8.0f;
    const float* column = scores + r % kGroup;
    uint32_t* pair = weights + r % kGroup;
    const Vf before = load(max + r), unit = splat(scale);
    Vf peak[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    for (int j = 0; j < kTile; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        peak[i] = KVKEYE_ISA::max(load(column + (j + i) * kGroup), peak[i]);
    const Vf found =
        KVKEYE_ISA::max(KVKEYE_ISA::max(peak[0], peak[1]), KVKEYE_ISA::max(peak[2], peak[3])) * unit;
    const Vf top = found > before + kSlack ? found : before, base = base_of(top);
    Vf part[4] = {};
    for (int j = 0; j < kTile; j += 8)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const float* score = column + (j + 2 * i) * kGroup;
        const Vf first = weight_of(fma(load(score), unit, -base));
        const Vf second = weight_of(fma(load(score + kGroup), unit, -base));
        part[i] = part[i] + first + second;
        const Vu word = ((Vu)first + 0x8000u) >> 16 | (((Vu)second + 0x8000u) & 0xffff0000u);
        store((float*)pair + (j / 2 + i) * kGroup, (Vf)word);
      }
    const Vf sum = (part[0] + part[1]) + (part[2] + part[3]), keep = weight_of(before - base);
    store(max + r, top);
    store(total + r, fma(load(total + r), keep, sum));
    if (_mm512_cmp_ps_mask((__m512)keep, (__m512)splat(1.0f), _CMP_NEQ_UQ) != 0)
      rescale(r, keep);
  }

  void rescale(int r, Vf keep) {
    float* sums = this->column(this->out, r);
    for (int64_t d = 0; d < dim * kGroup; d += kGroup)
      store(sums + d, load(sums + d) * keep);
  }
};

} // namespace
} // namespace kvkeye::KVKEYE_ISA

#endif
