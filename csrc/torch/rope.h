// Checks and tables that the rotary ops and the fused cache write share.
#pragma once

#include "checks.h"
#include "kvkeye/rope.h"

#include <cmath>
#include <vector>

namespace kvkeye {

// Positions and frequencies of a sectioned rotation, kept alive with the pointers into them.
struct Sections {
  Tensor positions;             // [3, tokens]
  std::vector<float> frequency; // [dim / 2]
  SectionedAngles angles() const;
  std::vector<int64_t> counts; // 3
};

inline SectionedAngles Sections::angles() const {
  return {read<int64_t>(positions), frequency.data(), positions.size(1), {counts[0], counts[1], counts[2]}};
}

inline Sections sections_of(const char* op, const Tensor& positions, const std::vector<int64_t>& sections,
                            double theta, int64_t tokens, int64_t dim) {
  const Argument argument{op, "positions", positions};
  argument.has_shape({3, tokens});
  argument.has_dtype(ScalarType::Long);
  require(dim <= kMaxHeadDim, op, ": the head size is ", dim, "; the C++ kernels take at most ", kMaxHeadDim,
          ".");
  int64_t sum = 0;
  for (const int64_t count : sections)
    sum += count < 0 ? dim : count;
  require(sections.size() == 3 && 2 * sum == dim, op, ": sections must be three counts that sum to half of ",
          dim, ", the head size; got ", sections.size(), " with sum ", sum, ".");
  Sections found{dense(positions), std::vector<float>(dim / 2), sections};
  for (int64_t i = 0; i < dim / 2; ++i)
    found.frequency[i] = (float)std::pow(theta, -(double)i / (double)(dim / 2));
  return found;
}

// A fused projection [tokens, (num_q_heads + 2 num_kv_heads) dim] and the weights of its norms.
struct Projection {
  Rows qkv;
  Tensor q_weight, k_weight; // [dim]
  int64_t num_q_heads, num_kv_heads, dim;
};

inline Projection projection_of(const char* op, const Tensor& qkv, const Tensor& q_weight,
                                const Tensor& k_weight, int64_t num_kv_heads) {
  const Argument argument{op, "qkv", qkv};
  argument.has_dim(2, "[T, (Hq + 2 Hkv) D]");
  const int64_t dim = q_weight.numel();
  require(dim > 0 && num_kv_heads > 0 && qkv.size(1) % dim == 0 && qkv.size(1) / dim > 2 * num_kv_heads, op,
          ": qkv has shape ", shape_text(qkv), "; expected [T, (Hq + 2 x ", num_kv_heads, ") x ", dim,
          "] with Hq >= 1.");
  for (const Argument& weight : {Argument{op, "q_weight", q_weight}, Argument{op, "k_weight", k_weight}}) {
    weight.has_shape({dim});
    weight.has_dtype(qkv.scalar_type());
  }
  return {as_rows(argument), dense(q_weight),
          dense(k_weight),   qkv.size(1) / dim - 2 * num_kv_heads,
          num_kv_heads,      dim};
}

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
