// Which rows a block of threads works on, and what each of them sees.
#pragma once

#include "kvkeye/attention_cuda.h"

#include "device.h"

namespace kvkeye::cuda {

// Neighbouring rows of one sequence and KV head. A row is a pair (token, query head of the group), counted
// from the sequence's first new token.
struct RowTile {
  int sequence;
  int first_token, fresh; // new tokens of the sequence: the first one, how many
  int context;
  int pair; // the first row
  int end;  // one past the last position that a row of the tile sees
};

// Tiles of sequence b begin at floor(cu_seqlens_q[b] group / rows) + b, which leaves room for its last,
// partly filled tile: the grid follows from the shapes, the sequence is found by bisection.
template <class T> __device__ int sequence_of(const PagedCudaParams<T>& p, int tile, int group, int rows) {
  int low = 0, high = p.num_sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.cu_seqlens_q[middle] * group / rows + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T>
__device__ RowTile row_tile_of(const PagedCudaParams<T>& p, int tile, int group, int rows) {
  RowTile found;
  found.sequence = sequence_of(p, tile, group, rows);
  found.first_token = p.cu_seqlens_q[found.sequence];
  found.fresh = p.cu_seqlens_q[found.sequence + 1] - found.first_token;
  found.context = p.context_lens[found.sequence];
  if (found.first_token < 0 || found.fresh < 0 || found.first_token + found.fresh > p.num_tokens ||
      found.context > (int64_t)p.max_blocks * p.block_size)
    __trap();
  found.pair = (tile - (found.first_token * group / rows + found.sequence)) * rows;
  const int last = min(found.fresh * group, found.pair + rows) - 1;
  found.end = p.tree_mask != nullptr ? found.context : found.context - found.fresh + last / group + 1;
  found.end = max(found.end, 0);
  return found;
}

// Positions below prefix, and position prefix + j where bit j is set.
struct View {
  int prefix;
  uint64_t bits;

  __device__ bool sees(int position) const {
    const int after = position - prefix;
    return after < 0 || (after < 64 && (bits >> after & 1) != 0);
  }
};

template <class T>
__device__ View view_of(const PagedCudaParams<T>& p, const RowTile& tile, int pair, int group) {
  if (pair >= tile.fresh * group)
    return {0, 0};
  const int token = pair / group, old = tile.context - tile.fresh;
  if (p.tree_mask == nullptr)
    return {old + token + 1, 0};
  const uint64_t own = tile.fresh < 64 ? ((uint64_t)1 << tile.fresh) - 1 : ~(uint64_t)0;
  return {old, (uint64_t)p.tree_mask[tile.first_token + token] & own};
}

} // namespace kvkeye::cuda
