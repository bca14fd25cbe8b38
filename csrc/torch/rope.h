// Checks and tables that the rotary ops and the fused cache write share.
#pragma once

#include "checks.h"
#include "kvkeye/rope.h"

#include <vector>

namespace kvkeye {

// Positions and frequencies of a sectioned rotation, kept alive with the pointers into them.
struct Sections {
  Tensor positions;             // [3, tokens]
  std::vector<float> frequency; // [dim / 2]
  SectionedAngles angles() const;
  std::vector<int64_t> counts; // 3
};

Sections sections_of(const char* op, const Tensor& positions, const std::vector<int64_t>& sections,
                     double theta, int64_t tokens, int64_t dim);

// A fused projection [tokens, (num_q_heads + 2 num_kv_heads) dim] and the weights of its norms.
struct Projection {
  Rows qkv;
  Tensor q_weight, k_weight; // [dim]
  int64_t num_q_heads, num_kv_heads, dim;
};

Projection projection_of(const char* op, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                         int64_t num_kv_heads);

// Everything of the params but outputs and caches.
template <class T>
QkNormMropeParams<T> norm_mrope_params(const Projection& projection, const Sections& sections, double eps) {
  QkNormMropeParams<T> params{};
  params.qkv = read<T>(projection.qkv.tensor);
  params.q_weight = read<T>(projection.q_weight);
  params.k_weight = read<T>(projection.k_weight);
  params.angles = sections.angles();
  params.num_q_heads = projection.num_q_heads;
  params.num_kv_heads = projection.num_kv_heads;
  params.dim = projection.dim;
  params.stride = projection.qkv.stride;
  params.eps = (float)eps;
  return params;
}

} // namespace kvkeye
