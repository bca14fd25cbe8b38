// Attention over a paged cache: decode, verification of drafts, trees, chunks of a prompt, by one order of
// sums. README.md beside this says how a call is cut and why a row's bits do not depend on its neighbours.
#include "kvkeye/attention_cuda.h"

#include "attention_e4m3.h"
#include "attention_rows.h"

namespace kvkeye::cuda {
namespace {

template <class T, int Dim, int Groups> struct Shared {
  static constexpr int kWarps = kSlices * Groups;

  struct Stage {
    typename Stored<T, Dim>::Rows keys, values;
  };
  // The states of a split's four slices, fragment by fragment.
  struct Merge {
    float4 o[kWarps][Layout<Dim>::kColumns][32];
  };
  union {
    Stage stages[2];
    Merge merge;
  };
  RowState rows[kWarps][16];
  int last; // whether this block is the last of its rows to arrive
};

// Who this thread is and what it works on.
template <class T, int Dim, int Groups> struct Work {
  static constexpr int kRows = 16 * Groups;
  // Output fragments of a row that a warp owns after a split.
  static constexpr int kOwned = (Layout<Dim>::kColumns + kSlices - 1) / kSlices;

  const PagedCudaParams<T>& p;
  Shared<T, Dim, Groups>& shared;
  int warp, group, slice; // the warp; its 16 rows, its keys
  int heads;              // query heads per KV head
  RowTile tile;

  __device__ Work(const PagedCudaParams<T>& params, Shared<T, Dim, Groups>& memory)
      : p(params), shared(memory), warp((int)threadIdx.x / 32), group(warp / kSlices), slice(warp % kSlices),
        heads(p.num_q_heads / p.num_kv_heads), tile(row_tile_of(p, (int)blockIdx.x, heads, kRows)) {}

  // The lane's row h of two.
  __device__ int pair_of(int h) const { return tile.pair + 16 * group + lane_of() / 4 + 8 * h; }

  // token * num_q_heads + head of that row, negative where there is none.
  __device__ int place_of_row(int h) const {
    const int pair = pair_of(h), head = (int)blockIdx.y * heads + pair % heads;
    return pair < tile.fresh * heads ? (tile.first_token + pair / heads) * p.num_q_heads + head : -1;
  }

  __device__ bool has_rows() const { return tile.pair < tile.fresh * heads; }

  __device__ const bf16* query(int h) const {
    const int place = place_of_row(h);
    if (place < 0)
      return nullptr;
    return p.q + place / p.num_q_heads * p.q_token_stride + place % p.num_q_heads * p.q_head_stride;
  }

  // Below it every row of the tile sees every position.
  __device__ int seen_by_all() const {
    const int old = tile.context - tile.fresh;
    return p.tree_mask != nullptr ? old : old + tile.pair / heads + 1;
  }

  // Where in the cache position `start` + lane of this warp's slice lies.
  __device__ int place_of(int start) const {
    const int position = start + kSliceKeys * slice + lane_of() % kSliceKeys;
    if (position >= tile.end)
      return -1;
    const int block = p.block_table[(int64_t)tile.sequence * p.max_blocks + position / p.block_size];
    if (block < 0 || block >= p.num_blocks)
      __trap();
    return (block * p.num_kv_heads + (int)blockIdx.y) * p.block_size + position % p.block_size;
  }

  // This group's share of the slice's rows.
  __device__ void load(int stage, int place) const {
    constexpr int kCount = kSliceKeys / Groups;
    auto& target = shared.stages[stage];
    load_slice<T, Dim>(target.keys, p.k_cache, place, slice, group * kCount, kCount);
    load_slice<T, Dim>(target.values, p.v_cache, place, slice, group * kCount, kCount);
  }

  // Of the lane's key, whose place is negative where there is none.
  __device__ KeyScales<T> scales_of(int place) const {
    KeyScales<T> found{};
    if constexpr (kIsE4m3<T>)
      if (place >= 0)
        found = {__fmul_rn(p.k_scales[place], p.softmax_scale), p.v_scales[place]};
    return found;
  }

  __device__ void load_rows(uint32_t (&q)[Layout<Dim>::kSteps][4]) const {
    if constexpr (kIsE4m3<T>)
      load_mixed_queries<Dim>(q, {query(0), query(1)});
    else
      load_queries<Dim>(q, {query(0), query(1)});
  }

  // The warps that share a slice wait for each other.
  __device__ void wait() const {
    if constexpr (Groups == 1)
      __syncwarp();
    else
      __syncthreads();
  }

  __device__ void hide(float (&scores)[2][4], int start) const {
    const View views[2] = {view_of(p, tile, pair_of(0), heads), view_of(p, tile, pair_of(1), heads)};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int position = start + kSliceKeys * slice + 8 * (i / 4) + 2 * (lane_of() % 4) + i % 2;
      if (!views[i % 4 / 2].sees(position))
        scores[i / 4][i % 4] = kMinusInfinity;
    }
  }

  __device__ void attend_tile(WarpState<Dim>& state, const uint32_t (&q)[Layout<Dim>::kSteps][4], int stage,
                              int start, const KeyScales<T>& scales) const {
    float scores[2][4] = {};
    if constexpr (kIsE4m3<T>) {
      multiply_levels<Dim>(scores, q, shared.stages[stage].keys, slice);
      multiply_columns(scores, scales.score);
    } else {
      multiply_keys<Dim>(scores, q, shared.stages[stage].keys, slice);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        scores[i / 4][i % 4] = __fmul_rn(scores[i / 4][i % 4], p.softmax_scale);
    }
    if (start + kCudaTile > seen_by_all())
      hide(scores, start);
    weigh<Dim>(state, scores);
    uint32_t weights[4];
    if constexpr (kIsE4m3<T>) {
      multiply_columns(scores, scales.weight);
      pack_weights(weights, scores);
      add_levels<Dim>(state.o, weights, shared.stages[stage].values, slice);
    } else {
      pack_weights(weights, scores);
      multiply_values<Dim>(state.o, weights, shared.stages[stage].values, slice);
    }
  }

  // The warp's slices of positions [begin, end), tile by tile; the next tile is on its way meanwhile.
  __device__ void attend(WarpState<Dim>& state, const uint32_t (&q)[Layout<Dim>::kSteps][4], int begin,
                         int end) const {
    if (begin >= end)
      return; // a copy that nobody waits for would land in what comes next
    int place = place_of(begin), stage = 0;
    load(0, place);
    commit_copies();
    KeyScales<T> scales = scales_of(place), next{};
    place = place_of(begin + kCudaTile);
    for (int start = begin; start < end; start += kCudaTile, stage ^= 1) {
      if (start + kCudaTile < end) {
        load(stage ^ 1, place);
        next = scales_of(place);
        place = place_of(start + 2 * kCudaTile);
      }
      commit_copies();
      wait_copies<1>();
      wait();
      attend_tile(state, q, stage, start, scales);
      wait();
      scales = next;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
      state.rows[h].total = quad_sum(state.rows[h].total);
  }

  // The slices' states become one, in their order. Warp w of a group leaves with the fragments w, w + 4, ...
  __device__ void merge_slices(const WarpState<Dim>& state, float (&o)[kOwned][4],
                               RowState (&rows)[2]) const {
    const int lane = lane_of(), row = lane / 4;
    __syncthreads(); // the stages are read: their memory is free
    if constexpr (kIsE4m3<T>) {
      store_in_order<Dim>(shared.merge.o[warp], state.o);
    } else {
#pragma unroll
      for (int i = 0; i < Layout<Dim>::kColumns; ++i)
        shared.merge.o[warp][i][lane] =
            make_float4(state.o[i][0], state.o[i][1], state.o[i][2], state.o[i][3]);
    }
    if (lane % 4 == 0) {
      shared.rows[warp][row] = state.rows[0];
      shared.rows[warp][row + 8] = state.rows[1];
    }
    __syncthreads();
    clear(o, rows);
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const int from = group * kSlices + s;
      const Weights weights[2] = {join(rows[0], shared.rows[from][row]),
                                  join(rows[1], shared.rows[from][row + 8])};
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        if (slice + kSlices * i >= Layout<Dim>::kColumns)
          continue;
        const float4 more = shared.merge.o[from][slice + kSlices * i][lane];
        add(o[i], weights, more);
      }
    }
  }

  __device__ static void clear(float (&o)[kOwned][4], RowState (&rows)[2]) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i)
      o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    rows[0] = rows[1] = {kMinusInfinity, 0.0f};
  }

  __device__ static void add(float (&o)[4], const Weights (&weights)[2], const float4& more) {
    o[0] = joined(weights[0], o[0], more.x);
    o[1] = joined(weights[0], o[1], more.y);
    o[2] = joined(weights[1], o[2], more.z);
    o[3] = joined(weights[1], o[3], more.w);
  }

  // The first dimension of owned fragment i in this lane.
  __device__ int column_of(int i) const { return 8 * (slice + kSlices * i) + 2 * (lane_of() % 4); }
  __device__ bool writes_rows() const { return slice == 0 && lane_of() % 4 == 0; }

  __device__ void write_result(const float (&o)[kOwned][4], const RowState (&rows)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t place = place_of_row(h);
      if (place < 0)
        continue;
      const float scale = inverse_of(rows[h].total);
#pragma unroll
      for (int i = 0; i < kOwned; ++i)
        if (column_of(i) < Dim)
          *reinterpret_cast<uint32_t*>(p.o + place * Dim + column_of(i)) =
              pack_bf16(o[i][2 * h] * scale, o[i][2 * h + 1] * scale);
      if (writes_rows())
        p.lse[place] = lse_of(rows[h]);
    }
  }

  __device__ void write_partial(const float (&o)[kOwned][4], const RowState (&rows)[2], int split) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = place_of_row(h);
      if (row < 0)
        continue;
      const int64_t place = (int64_t)row * gridDim.z + split;
#pragma unroll
      for (int i = 0; i < kOwned; ++i)
        if (column_of(i) < Dim)
          *reinterpret_cast<float2*>(p.partial_o + place * Dim + column_of(i)) =
              make_float2(o[i][2 * h], o[i][2 * h + 1]);
      if (writes_rows())
        *reinterpret_cast<float2*>(p.partial_state + 2 * place) = make_float2(rows[h].peak, rows[h].total);
    }
  }

  // Whether all other splits of these rows are written and seen. Leaves the count as it was found: zero.
  __device__ bool is_last(int splits) const {
    __syncthreads(); // the block's partial results before its arrival
    if (threadIdx.x == 0) {
      int32_t* count = p.arrivals + (int64_t)blockIdx.x * gridDim.y + blockIdx.y;
      __threadfence();
      const bool last = atomicAdd(count, 1) == splits - 1;
      __threadfence();
      if (last)
        atomicExch(count, 0);
      shared.last = last;
    }
    __syncthreads();
    return shared.last != 0;
  }

  __device__ void fold_splits(int splits, float (&o)[kOwned][4], RowState (&rows)[2]) const {
    clear(o, rows);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = place_of_row(h);
      if (row < 0)
        continue;
      const float* states = p.partial_state + 2 * (int64_t)row * gridDim.z;
      const float* parts = p.partial_o + (int64_t)row * gridDim.z * Dim;
#pragma unroll 4
      for (int split = 0; split < splits; ++split) {
        const float2 state = *reinterpret_cast<const float2*>(states + 2 * split);
        const Weights weights = join(rows[h], {state.x, state.y});
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          if (column_of(i) >= Dim)
            continue;
          const float2 more = *reinterpret_cast<const float2*>(parts + split * Dim + column_of(i));
          o[i][2 * h] = joined(weights, o[i][2 * h], more.x);
          o[i][2 * h + 1] = joined(weights, o[i][2 * h + 1], more.y);
        }
      }
    }
  }
};

// Grid: row tiles, KV heads, splits side by side.
template <class T, int Dim, int Groups>
__global__ void __launch_bounds__(32 * kSlices * Groups, Groups == 1 ? 2 : 1)
    paged_attention_kernel(const __grid_constant__ PagedCudaParams<T> p) {
  using Job = Work<T, Dim, Groups>;
  const Job work(p, shared_memory<Shared<T, Dim, Groups>>());
  const int splits = max(1, (work.tile.end + kCudaSplit - 1) / kCudaSplit);
  if (!work.has_rows() || (int)blockIdx.z >= splits)
    return;
  const bool side_by_side = gridDim.z > 1;
  uint32_t q[Layout<Dim>::kSteps][4];
  work.load_rows(q);
  float o[Job::kOwned][4];
  RowState rows[2];
  Job::clear(o, rows);
  for (int split = (int)blockIdx.z; split < splits; split += (int)gridDim.z) {
    WarpState<Dim> state;
    state.clear();
    const int begin = split * kCudaSplit;
    work.attend(state, q, begin, min(work.tile.end, begin + kCudaSplit));
    float split_o[Job::kOwned][4];
    RowState split_rows[2];
    work.merge_slices(state, split_o, split_rows);
    const Weights weights[2] = {join(rows[0], split_rows[0]), join(rows[1], split_rows[1])};
#pragma unroll
    for (int i = 0; i < Job::kOwned; ++i)
      Job::add(o[i], weights, make_float4(split_o[i][0], split_o[i][1], split_o[i][2], split_o[i][3]));
    __syncthreads(); // the merged states are read: their memory is free
  }
  if (side_by_side && splits > 1) {
    work.write_partial(o, rows, (int)blockIdx.z);
    if (!work.is_last(splits))
      return;
    work.fold_splits(splits, o, rows);
  }
  work.write_result(o, rows);
}

template <class T, int Dim, int Groups>
int start(const PagedCudaParams<T>& p, const PagedCudaPlan& plan, void* stream) {
  const dim3 grid((unsigned)plan.row_tiles, (unsigned)p.num_kv_heads, (unsigned)plan.splits);
  return launch<paged_attention_kernel<T, Dim, Groups>>(grid, dim3(32 * kSlices * Groups),
                                                        sizeof(Shared<T, Dim, Groups>), stream, p);
}

template <class T, int Dim> int start(const PagedCudaParams<T>& p, const PagedCudaPlan& plan, void* stream) {
  return plan.row_groups == 1 ? start<T, Dim, 1>(p, plan, stream) : start<T, Dim, 2>(p, plan, stream);
}

} // namespace

template <class T>
int paged_attention(const PagedCudaParams<T>& params, const PagedCudaPlan& plan, int64_t head_dim,
                    void* stream) {
  if (params.num_tokens == 0 || params.num_sequences == 0)
    return cudaSuccess;
  PagedCudaParams<T> p = params;
  p.softmax_scale *= kLog2E;
  if (head_dim == 64)
    return start<T, 64>(p, plan, stream);
  if (head_dim == 128)
    return start<T, 128>(p, plan, stream);
  if constexpr (!kIsE4m3<T>) { // rows of 16 bytes, two steps of 16 dimensions
    if (head_dim == 72)
      return start<T, 72>(p, plan, stream);
    if (head_dim == 80)
      return start<T, 80>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

template int paged_attention<bf16>(const PagedCudaParams<bf16>&, const PagedCudaPlan&, int64_t, void*);
template int paged_attention<e4m3>(const PagedCudaParams<e4m3>&, const PagedCudaPlan&, int64_t, void*);

} // namespace kvkeye::cuda
