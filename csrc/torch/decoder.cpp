// A decoder layer, made of its ops without the way back to Python between them.
#include "layers.h"

namespace kvkeye {
namespace {

constexpr const char* kOp = "decoder_layer";

// In the order of the argument `weights`.
enum Part { kInputNorm, kQkv, kQNorm, kKNorm, kOut, kPostNorm, kGateUp, kDown };
constexpr size_t kParts = 8;
// In the order of the argument `scales`.
enum Matrix { kQkvScales, kOutScales, kGateUpScales, kDownScales };
constexpr size_t kMatrices = 4;

struct Weights {
  const std::vector<Tensor>&parts, &scales;

  const Tensor& operator[](Part part) const { return parts[part]; }

  // [T, K] -> [T, outputs].
  Tensor project(const Tensor& x, Part part, Matrix matrix, int64_t outputs) const {
    if (!scales.empty())
      return int8_linear(x, parts[part], scales[matrix], std::nullopt);
    return parts[part].dim() == 2 ? packed_linear(x, parts[part], std::nullopt)
                                  : prepacked_linear(x, parts[part], std::nullopt, outputs);
  }
  Tensor gated(const Tensor& x, int64_t outputs) const {
    const Tensor& weight = parts[kGateUp];
    if (!scales.empty())
      return int8_linear_silu_mul(x, weight, scales[kGateUpScales]);
    return weight.dim() == 2 ? silu_mul(packed_linear(x, weight, std::nullopt))
                             : prepacked_linear_silu_mul(x, weight, outputs);
  }
};

std::tuple<Tensor, Tensor>
decoder_layer(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& positions,
              const std::vector<Tensor>& parts, const std::vector<Tensor>& scales, const Tensor& k_cache,
              const Tensor& v_cache, const Tensor& block_table, const Tensor& cu_seqlens_q,
              const Tensor& context_lens, const Tensor& slot_mapping, const std::optional<Tensor>& tree_mask,
              const std::vector<int64_t>& sections, int64_t num_q_heads, int64_t intermediate, double theta,
              double eps, double softmax_scale) {
  require(parts.size() == kParts, kOp, ": weights are ", parts.size(), "; expected ", kParts, ".");
  require(scales.empty() || scales.size() == kMatrices, kOp, ": scales are ", scales.size(),
          "; expected none or ", kMatrices, ".");
  Argument{kOp, "x", x}.has_dim(2, "[T, H]");
  Argument{kOp, "k_cache", k_cache}.has_dim(4, "[N, Hkv, P, D]");
  const Weights weights{parts, scales};
  const int64_t tokens = x.size(0), hidden = x.size(1), dim = k_cache.size(3);
  Tensor normed = x, total = x;
  if (residual.has_value())
    std::tie(normed, total) = add_rms_norm(x, *residual, weights[kInputNorm], eps);
  else
    normed = rms_norm(x, weights[kInputNorm], eps);
  const Tensor qkv = weights.project(normed, kQkv, kQkvScales, (num_q_heads + 2 * k_cache.size(1)) * dim);
  const Tensor q = qk_norm_mrope_append(qkv, weights[kQNorm], weights[kKNorm], positions, k_cache, v_cache,
                                        slot_mapping, sections, theta, eps); // [T, Hq, D]
  const Tensor o = std::get<0>(paged_attention(q, k_cache, v_cache, block_table, cu_seqlens_q, context_lens,
                                               tree_mask, softmax_scale));
  const Tensor attended =
      weights.project(torch::stable::view(o, {tokens, num_q_heads * dim}), kOut, kOutScales, hidden);
  std::tie(normed, total) = add_rms_norm(attended, total, weights[kPostNorm], eps);
  return {weights.project(weights.gated(normed, intermediate), kDown, kDownScales, hidden), total};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("decoder_layer", TORCH_BOX(&decoder_layer));
}

} // namespace kvkeye
