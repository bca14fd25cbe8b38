// Normalisations: tensors to Params to kernels.
#include "kvkeye/norm.h"
#include "checks.h"

namespace kvkeye {
namespace {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Rows rows = as_rows({"rms_norm", "x", x});
  const Argument weight_argument{"rms_norm", "weight", weight};
  weight_argument.has_shape({rows.dim});
  weight_argument.has_dtype(x.scalar_type());
  const Tensor scale = dense(weight), y = empty_dense(x);
  with_type({"rms_norm", "x", x}, [&](auto type) {
    using T = decltype(type);
    const RmsNormParams<T> params{read<T>(rows.tensor), read<T>(scale), write<T>(y), rows.dim,
                                  rows.stride,          (float)eps};
    for_items(rows.count, rows.dim, [&](int64_t begin, int64_t end) { cpu::rms_norm(params, begin, end); });
  });
  return y;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}

} // namespace kvkeye
