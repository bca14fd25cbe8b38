// What follows a product in a layer: bias, rounding, epilogue.
#pragma once

#include "activation_math.h"
#include "linear_walk.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// product(part, o, lanes): totals of a row as numbers, of the gate or the only part, or of what is multiplied
// with it. They are rounded as an op of its own would have stored them, then comes the epilogue.
template <class Params, class Product>
KVKEYE_INLINE void finish_row(const Params& p, int64_t row, const Part& outputs, const Product& product) {
  using T = typename Params::Output;
  T* y = p.y + row * p.outputs + outputs.first;
  for_vectors(outputs.count, [&](int64_t o, int lanes) KVKEYE_LAMBDA {
    const int64_t output = outputs.first + o;
    Vf value = product(0, o, lanes) + (p.bias == nullptr ? Vf{} : load(p.bias + output, lanes));
    if (p.epilogue != Epilogue::none)
      value = rounded<T>(value);
    if (p.epilogue == Epilogue::add)
      value = load(p.residual + row * p.residual_stride + output, lanes) + value;
    else if (p.epilogue == Epilogue::silu_mul)
      value = silu_mul_value(value, rounded<T>(product(1, o, lanes)));
    else if (p.epilogue != Epilogue::none)
      value = gelu_value(value, p.epilogue == Epilogue::gelu_tanh);
    store(y + o, value, lanes);
  });
}

// Rows of a panel of outputs. With two parts the second panel of a block completes it.
template <class Params, class ProductOf>
KVKEYE_INLINE void finish_rows(const Item<Params>& item, int panel, const Part& rows,
                               const ProductOf& product_of) {
  const Params& p = item.p;
  if ((panel + 1) % p.parts() != 0)
    return;
  const int first_panel = panel + 1 - p.parts();
  const int64_t first = (item.blocks.first + panel / p.parts()) * kPanel, left = p.outputs - first;
  const Part outputs{first, left < kPanel ? left : kPanel};
  for (int64_t m = rows.first; m < rows.first + rows.count; ++m) {
    const int64_t row = item.rows.first + m;
    finish_row(p, row, outputs, [&](int part, int64_t o, int lanes) KVKEYE_LAMBDA {
      const float* total = item.scratch.total[first_panel + part] + m * kPanel + o;
      return product_of(total, row, part * p.outputs + first + o, lanes);
    });
  }
}

} // namespace
} // namespace kvkeye::KVKEYE_ISA
