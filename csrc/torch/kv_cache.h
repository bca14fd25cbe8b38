// Checks and params of the cache writes, the same for CPU and CUDA tensors: only metadata is read here.
#pragma once

#include "checks.h"
#include "kvkeye/kv_cache.h"

namespace kvkeye {

struct Cache {
  int64_t blocks, heads, block_size, dim;
};

inline Cache cache_of(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  const Argument keys{op, "k_cache", k_cache}, values{op, "v_cache", v_cache};
  keys.has_dim(4, "[N, Hkv, P, D]");
  values.has_shape_of("k_cache", k_cache);
  values.has_dtype(k_cache.scalar_type());
  require(k_cache.is_contiguous() && v_cache.is_contiguous(), op,
          ": the caches must be contiguous, as they are written in place.");
  return {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)};
}

// Params with the tensors that they point into.
struct Append {
  AppendKvParams params;
  int64_t tokens;
  Tensor rows[2], slots;
};

// Rows are of `dtype`.
inline Append append_of(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& slot_mapping, ScalarType dtype) {
  const char* op = "append_kv";
  const Cache cache = cache_of(op, k_cache, v_cache);
  const Argument slots{op, "slot_mapping", slot_mapping};
  slots.has_dim(1, "[T]");
  slots.has_dtype(ScalarType::Long);
  Append append{{}, slot_mapping.size(0), {k, v}, dense(slot_mapping)};
  AppendKvParams& params = append.params;
  const int64_t size = (int64_t)k.element_size();
  for (int side = 0; side < 2; ++side) {
    Tensor& rows = append.rows[side];
    const Argument argument{op, side == 0 ? "k" : "v", rows};
    argument.has_shape({append.tokens, cache.heads, cache.dim});
    argument.has_dtype(dtype);
    if (rows.stride(2) != 1)
      rows = torch::stable::contiguous(rows);
    params.source[side] = read<char>(rows);
    params.cache[side] = write<char>(side == 0 ? k_cache : v_cache);
    params.token_stride[side] = rows.stride(0) * size;
    params.head_stride[side] = rows.stride(1) * size;
  }
  params.slot_mapping = read<int64_t>(append.slots);
  params.slots = cache.blocks * cache.block_size;
  params.heads = cache.heads;
  params.block_size = cache.block_size;
  params.row_bytes = cache.dim * (int64_t)k_cache.element_size();
  return append;
}

struct Copy {
  CopyBlocksParams params;
  int64_t pairs;
  Tensor block_pairs;
};

inline Copy copy_of(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const Cache cache = cache_of("copy_blocks", k_cache, v_cache);
  const Argument argument{"copy_blocks", "block_pairs", block_pairs};
  argument.has_dtype(ScalarType::Long);
  argument.has_dim(2, "[n, 2]");
  argument.has_shape({block_pairs.size(0), 2});
  Copy copy{{}, block_pairs.size(0), dense(block_pairs)};
  const int64_t block_floats = cache.heads * cache.block_size * cache.dim;
  copy.params = {{write<char>(k_cache), write<char>(v_cache)},
                 read<int64_t>(copy.block_pairs),
                 cache.blocks,
                 block_floats * (int64_t)k_cache.element_size()};
  return copy;
}

} // namespace kvkeye
