// What the attention bindings share: heads, sequence bounds, working memory per thread.
#pragma once

#include "checks.h"
#include "kvkeye/attention.h"

#include <algorithm>
#include <memory>

namespace kvkeye {

// A tensor [T, H, D] whose last axis is contiguous.
struct Heads {
  Tensor tensor;
  HeadStrides strides;
};

inline Heads as_heads(const Tensor& x) {
  const Tensor tensor = x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
  return {tensor, {tensor.stride(0), tensor.stride(1)}};
}

inline int64_t group_of(const char* op, int64_t q_heads, int64_t kv_heads) {
  require(kv_heads > 0 && q_heads % kv_heads == 0, op, ": ", q_heads, " query heads are not a multiple of ",
          kv_heads, " KV heads.");
  return q_heads / kv_heads;
}

// Ascending int32 from 0 to rows.
inline void check_bounds(const Argument& argument, int64_t rows) {
  argument.has_dim(1, "[B + 1]");
  argument.has_dtype(ScalarType::Int);
  require(argument.tensor.size(0) >= 1, argument.op, ": ", argument.name, " is empty; expected [B + 1].");
  const Tensor bounds = dense(argument.tensor);
  const int32_t* values = read<int32_t>(bounds);
  const int64_t last = bounds.size(0) - 1;
  require(values[0] == 0 && values[last] == rows, argument.op, ": ", argument.name, " runs from ", values[0],
          " to ", values[last], "; expected 0 to ", rows, ".");
  for (int64_t b = 0; b < last; ++b)
    require(values[b] <= values[b + 1], argument.op, ": ", argument.name, "[", b, "] = ", values[b], " and [",
            b + 1, "] = ", values[b + 1], "; expected ascending values.");
}

// for_items, each thread with its own copy of params whose scratch holds that many floats.
template <class Params, class Kernel>
void for_items_with_scratch(const Params& params, int64_t items, int64_t cost, int64_t floats,
                            const Kernel& kernel) {
  for_items(items, cost, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[floats]);
    Params mine = params;
    mine.scratch = scratch.get();
    kernel(mine, begin, end);
  });
}

} // namespace kvkeye
