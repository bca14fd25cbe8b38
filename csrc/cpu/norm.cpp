// Normalisations over the last axis, forward and backward.
#include "kvkeye/norm.h"
#include "norm_math.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

struct Moments {
  float mean, scale;
};

template <class T> KVKEYE_INLINE Moments moments(const T* x, int64_t dim, float eps) {
  const float mean = sum_of(x, dim, [](Vf value) KVKEYE_LAMBDA { return value; }) / (float)dim;
  const float squares = sum_of(x, dim, [&](Vf value) KVKEYE_LAMBDA {
    const Vf centred = value - mean;
    return centred * centred;
  });
  return {mean, inverse_root(squares, dim, eps)};
}

// The input of the norm for a row of a backward pass, not rounded: sums of a gradient stay in fp32.
template <class T> struct BackwardRow {
  const T *x, *residual, *grad;
  float mean, scale;

  __attribute__((always_inline)) Vf normed(int64_t i, int lanes) const {
    Vf value = load(x + i, lanes);
    if (residual != nullptr)
      value += load(residual + i, lanes);
    return keep(value - mean, lanes) * scale;
  }
};

template <class T> KVKEYE_INLINE BackwardRow<T> backward_row(const NormBackwardParams<T>& p, int64_t row) {
  const T* residual = p.residual == nullptr ? nullptr : p.residual + row * p.residual_stride;
  const float mean = p.mean == nullptr ? 0.0f : p.mean[row];
  return {p.x + row * p.x_stride, residual, p.grad + row * p.dim, mean, p.scale[row]};
}

template <class T> KVKEYE_INLINE void row_statistics(const NormBackwardParams<T>& p, int64_t row) {
  const T* x = p.x + row * p.x_stride;
  if (p.mean != nullptr) {
    const Moments found = moments(x, p.dim, p.eps);
    p.mean[row] = found.mean;
    p.scale[row] = found.scale;
  } else if (p.residual == nullptr) {
    p.scale[row] = inverse_root(x, p.dim, p.eps);
  } else {
    const T* residual = p.residual + row * p.residual_stride;
    const float squares = sum_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      const Vf value = load(x + i, lanes) + load(residual + i, lanes);
      return value * value;
    });
    p.scale[row] = inverse_root(squares, p.dim, p.eps);
  }
}

} // namespace

template <class T> void rms_norm(const RmsNormParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.x_stride;
    if (p.residual != nullptr) {
      T* total = p.total + row * p.dim;
      map_vectors(
          0, p.dim, total, [](Vf a, Vf b) KVKEYE_LAMBDA { return a + b; }, x,
          p.residual + row * p.residual_stride);
      x = total;
    }
    const float scale = inverse_root(x, p.dim, p.eps);
    const auto normed = [&](const auto& value, const auto& weight)
                            KVKEYE_LAMBDA { return rounded<T>(value * scale) * weight; };
    map_pairs(0, p.dim, p.y + row * p.dim, normed, x, p.weight);
  }
}

template <class T> void layer_norm(const LayerNormParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = p.x + row * p.x_stride;
    const Moments found = moments(x, p.dim, p.eps);
    const auto normed = [&](Vf value, Vf weight, Vf bias)
                            KVKEYE_LAMBDA { return fma((value - found.mean) * found.scale, weight, bias); };
    map_vectors(0, p.dim, p.y + row * p.dim, normed, x, p.weight, p.bias);
  }
}

// With n the normed row and g = grad * weight: grad_x = scale (g - mean(g) - n mean(g n)), where the mean of
// g only enters when the forward subtracted one.
template <class T> void norm_backward_rows(const NormBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    row_statistics(p, row);
    const BackwardRow<T> r = backward_row(p, row);
    const auto weighted = [&](int64_t i, int lanes)
                              KVKEYE_LAMBDA { return load(r.grad + i, lanes) * load(p.weight + i, lanes); };
    const float along =
        sum_vectors(p.dim, [&](int64_t i, int lanes)
                               KVKEYE_LAMBDA { return weighted(i, lanes) * r.normed(i, lanes); }) /
        (float)p.dim;
    const float shift = p.mean == nullptr ? 0.0f : sum_vectors(p.dim, weighted) / (float)p.dim;
    for_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
      Vf grad = (weighted(i, lanes) - shift - r.normed(i, lanes) * along) * r.scale;
      const int64_t at = row * p.dim + i;
      if (p.grad_total != nullptr)
        grad += load(p.grad_total + at, lanes);
      store(p.grad_x + at, grad, lanes);
      if (p.grad_residual != nullptr)
        store(p.grad_residual + at, grad, lanes);
    });
  }
}

template <class T> void norm_backward_columns(const NormBackwardParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    sum_rows(block, p.dim, p.rows, p.grad_weight, [&](int64_t row, int64_t i, int lanes) KVKEYE_LAMBDA {
      const BackwardRow<T> r = backward_row(p, row);
      return load(r.grad + i, lanes) * r.normed(i, lanes);
    });
    if (p.grad_bias == nullptr)
      continue;
    sum_rows(block, p.dim, p.rows, p.grad_bias, [&](int64_t row, int64_t i, int lanes) KVKEYE_LAMBDA {
      return load(p.grad + row * p.dim + i, lanes);
    });
  }
}

KVKEYE_INSTANTIATE(rms_norm, RmsNormParams)
KVKEYE_INSTANTIATE(layer_norm, LayerNormParams)
KVKEYE_INSTANTIATE(norm_backward_rows, NormBackwardParams)
KVKEYE_INSTANTIATE(norm_backward_columns, NormBackwardParams)

} // namespace kvkeye::KVKEYE_ISA
