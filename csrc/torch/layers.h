// CPU ops that other ops are made of, as their own bindings have them.
#pragma once

#include "checks.h"

#include <optional>
#include <tuple>
#include <vector>

namespace kvkeye {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                        double eps);
Tensor prepacked_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t outputs);
Tensor prepacked_linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                            const Tensor& residual);
Tensor prepacked_linear_silu_mul(const Tensor& x, const Tensor& packed, int64_t outputs);
Tensor qk_norm_mrope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                            const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& slot_mapping, const std::vector<int64_t>& sections, double theta,
                            double eps);
std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& cu_seqlens_q,
                                           const Tensor& context_lens, const std::optional<Tensor>& tree_mask,
                                           double softmax_scale);

} // namespace kvkeye
