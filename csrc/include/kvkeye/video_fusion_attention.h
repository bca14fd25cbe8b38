// Attention inside overlapping tiles of frames.
//
// Tokens whose frames lie in the same tiles form a run. A run of queries and a run of keys that share tiles
// multiply once, whatever the number of those tiles: the softmax of a tile is a sum of runs, weighted by what
// their denominators have to do with the tile's. Work is 2 m - 1 runs per run of queries at m tiles per
// frame, where one pass per tile would take m^2.
#pragma once

#include "kvkeye/attention.h"

namespace kvkeye {

// Keys [begin, end) whose frames lie in the same tiles.
struct TilePart {
  int64_t begin, end;
};

// Query tokens [begin, end) of one run, the keys that they see, and the tiles that they lie in.
struct TileBlock {
  int64_t begin, end;
  const TilePart* parts;  // [num_parts]
  const int32_t* members; // [num_members]: tiles, or a single -1 for text
  const uint8_t* joined;  // [num_parts, num_members]: whether the part's keys lie in the tile
  int64_t num_parts, num_members;
};

struct TileGeometry {
  const TileBlock* blocks; // [num_blocks]
  const int32_t* starts;   // [tiles]
  const float* weights;    // [tiles, length]
  int64_t num_blocks, tiles, length, frames, per_frame, tokens;
  int64_t most_rows, most_parts, most_members; // of a block
};

struct TokenStrides {
  int64_t batch, token, head;
};

// Items: batch times heads times blocks.
template <class T> struct TileAttentionParams {
  const T *q, *k, *v; // [batch, tokens, heads, dim]
  T* o;               // [batch, tokens, heads, dim]
  float* lse;         // [batch, heads, lse_size]
  TileGeometry tiling;
  TokenStrides q_strides, k_strides, v_strides;
  int64_t heads, dim, lse_size;
  float softmax_scale;
  float* scratch; // tile_attention_scratch() floats, one per thread
};

// Items: batch times heads.
template <class T> struct TileAttentionBackwardParams {
  const T* grad_o;                // [batch, tokens, heads, dim]
  const float* grad_lse;          // [batch, heads, lse_size]
  T *grad_q, *grad_k, *grad_v;    // [batch, tokens, heads, dim]
  double* grad_weights;           // [batch, heads, tiles, length]
  TileAttentionParams<T> forward; // without o and lse
};

static inline int64_t tile_attention_scratch(const TileGeometry& t, int64_t dim) {
  return t.most_parts * (t.most_rows * (padded_dim(dim) + 2) + 32) + 2 * (t.most_parts + 16) +
         attend_scratch(t.most_rows, dim) + 64;
}

static inline int64_t tile_attention_backward_scratch(const TileGeometry& t, int64_t dim) {
  const int64_t width = padded_dim(dim);
  return tile_attention_scratch(t, dim) + 2 * t.tokens * width + 3 * t.most_rows * width +
         3 * t.most_parts * (t.most_rows + 16) + 2 * (t.most_members + 16) +
         4 * kBackwardRows * kTilePositions + 3 * kTilePositions * width + 512;
}

KVKEYE_KERNEL(tile_attention, TileAttentionParams)
KVKEYE_KERNEL(tile_attention_backward, TileAttentionBackwardParams)

} // namespace kvkeye
