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
Tensor silu_mul(const Tensor& gate_up);
Tensor packed_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor prepacked_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                        int64_t outputs);
Tensor prepacked_linear_add(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias,
                            const Tensor& residual);
Tensor prepacked_linear_silu_mul(const Tensor& x, const Tensor& packed, int64_t outputs);
Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& scales,
                   const std::optional<Tensor>& bias);
Tensor int8_linear_silu_mul(const Tensor& x, const Tensor& packed, const Tensor& scales);
Tensor qk_norm_mrope_append(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                            const Tensor& positions, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& slot_mapping, const std::vector<int64_t>& sections, double theta,
                            double eps, const std::optional<Tensor>& k_scales = std::nullopt,
                            const std::optional<Tensor>& v_scales = std::nullopt);
std::tuple<Tensor, Tensor> paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& block_table, const Tensor& cu_seqlens_q,
                                           const Tensor& context_lens, const std::optional<Tensor>& tree_mask,
                                           double softmax_scale,
                                           const std::optional<Tensor>& k_scales = std::nullopt,
                                           const std::optional<Tensor>& v_scales = std::nullopt);

inline void refuse_scales(const char* op, const std::optional<Tensor>& k_scales,
                          const std::optional<Tensor>& v_scales) {
  require(!k_scales.has_value() && !v_scales.has_value(), op,
          ": k_scales and v_scales go with Float8_e4m3fn caches, which the C++ kernels do not take.");
}

} // namespace kvkeye
