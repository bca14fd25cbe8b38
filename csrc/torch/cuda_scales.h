// Float8_e4m3fn caches and their scales, from tensors.
#pragma once

#include "checks.h"
#include "kvkeye/common/e4m3.h"

#include <optional>
#include <utility>

namespace kvkeye {

struct Scales {
  const std::optional<Tensor>&k, &v;
};

inline bool is_e4m3(const Tensor& cache) {
  return cache.scalar_type() == ScalarType::Float8_e4m3fn;
}

// fp32, of the caches' shape without the last axis; none beside caches of another dtype.
inline void check_scales(const char* op, const Tensor& k_cache, const Scales& scales) {
  for (const auto& [name, given] : {std::pair{"k_scales", &scales.k}, std::pair{"v_scales", &scales.v}}) {
    if (!is_e4m3(k_cache)) {
      require(!given->has_value(), op, ": ", name, " are given; they go with Float8_e4m3fn caches.");
      continue;
    }
    require(given->has_value(), op, ": ", name, " are missing; Float8_e4m3fn caches need them.");
    const Argument argument{op, name, **given};
    argument.has_shape({k_cache.size(0), k_cache.size(1), k_cache.size(2)});
    argument.has_dtype(ScalarType::Float);
    require((*given)->is_contiguous(), op, ": ", name, " must be contiguous.");
  }
}

// Calls body with a value of what the cache holds: e4m3, or T like everything else.
template <class T, class Body> void with_cache_type(const Tensor& cache, Body body) {
  if (is_e4m3(cache))
    body(e4m3{});
  else
    body(T{});
}

} // namespace kvkeye
