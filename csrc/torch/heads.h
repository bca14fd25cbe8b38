// What the attention bindings share: heads, sequence bounds, working memory per thread.
#pragma once

#include "checks.h"
#include "kvkeye/attention.h"

#include <algorithm>
#include <atomic>
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

// How many query tokens go together: as many as may, in spans of about one size, which whole vectors of rows
// fill.
inline int64_t span_tokens(int64_t tokens, int64_t group) {
  const int64_t most = std::max<int64_t>(1, query_rows() / group),
                spans = std::max<int64_t>(1, (tokens + most - 1) / most);
  const int64_t even = (tokens + spans - 1) / spans;
  return std::clamp<int64_t>((even + 47) / 48 * 48, 1, most);
}

// for_items, each thread with its own copy of params whose scratch holds that many floats. Threads take
// `together` items at a time as they get on: items cost more or less, and cores are not always ours alone.
template <class Params, class Kernel>
void for_items_with_scratch(const Params& params, int64_t items, int64_t cost, int64_t floats,
                            const Kernel& kernel, int64_t together = 1) {
  std::atomic<int64_t> next{0};
  for_items(items, cost, [&](int64_t, int64_t) {
    int64_t begin = next.fetch_add(together);
    if (begin >= items)
      return;
    const std::unique_ptr<float[]> scratch(new float[floats]);
    Params mine = params;
    mine.scratch = scratch.get();
    for (; begin < items; begin = next.fetch_add(together))
      kernel(mine, begin, std::min(begin + together, items));
  });
}

} // namespace kvkeye
