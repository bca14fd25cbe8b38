// From torch tensors to plain pointers: argument checks with names and values, rows, threads.
//
// The one place, with the other files of this folder, that knows torch; and only its stable headers.
#pragma once

#include "kvkeye/common/isa.h"
#include "kvkeye/common/types.h"
#include "pages.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvkeye {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts> void require(bool condition, const Parts&... parts) {
  if (!condition)
    fail(parts...);
}

// Written out only where a message is: texts cost more than checks.
struct ShapeText {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, const ShapeText& shape) {
  out << '[';
  for (int64_t i = 0; i < shape.tensor.dim(); ++i)
    out << (i ? ", " : "") << shape.tensor.size(i);
  return out << ']';
}

inline ShapeText shape_text(const Tensor& tensor) {
  return {tensor};
}

inline const char* dtype_text(ScalarType dtype) {
  return torch::headeronly::toString(dtype);
}

// An argument of an op, so that a message can say `rms_norm: weight has shape [4]; ...`.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  void has_dim(int64_t dim, const char* layout) const {
    require(tensor.dim() == dim, op, ": ", name, " has ", tensor.dim(), " dimensions ", shape_text(tensor),
            "; expected ", layout, ".");
  }

  void has_dtype(ScalarType dtype) const {
    require(tensor.scalar_type() == dtype, op, ": ", name, " is ", dtype_text(tensor.scalar_type()),
            "; expected ", dtype_text(dtype), ". Convert it with .to().");
  }

  void has_shape(std::initializer_list<int64_t> shape) const {
    bool same = tensor.dim() == (int64_t)shape.size();
    int64_t i = 0;
    for (const int64_t size : shape)
      same = same && tensor.size(i++) == size;
    if (same)
      return;
    std::ostringstream wanted;
    for (const int64_t size : shape)
      wanted << (wanted.tellp() > 0 ? ", " : "") << size;
    fail(op, ": ", name, " has shape ", shape_text(tensor), "; expected [", wanted.str(), "].");
  }

  void has_shape_of(const char* other, const Tensor& like) const {
    bool same = tensor.dim() == like.dim();
    for (int64_t i = 0; same && i < like.dim(); ++i)
      same = tensor.size(i) == like.size(i);
    require(same, op, ": ", name, " has shape ", shape_text(tensor), "; expected that of ", other, ", ",
            shape_text(like), ".");
  }
};

// Calls body with a value of the storage type: body(float{}) or body(bf16{}).
template <class Body> void with_type(const Argument& argument, Body body) {
  switch (argument.tensor.scalar_type()) {
  case ScalarType::Float:
    return body(float{});
  case ScalarType::BFloat16:
    return body(bf16{});
  default:
    fail(argument.op, ": ", argument.name, " is ", dtype_text(argument.tensor.scalar_type()),
         "; the C++ kernels take Float or BFloat16. Convert it, or use the eager backend.");
  }
}

// Data pointers. They do not look at the dtype: check it first.
template <class T> const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T> T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A tensor seen as rows over its last axis. Copies only when the leading axes do not share one stride.
struct Rows {
  Tensor tensor;
  int64_t count, dim, stride;
};

inline Rows as_rows(const Argument& argument) {
  const Tensor& x = argument.tensor;
  require(x.dim() >= 1, argument.op, ": ", argument.name, " is a scalar; expected at least one dimension.");
  const int64_t dim = x.size(-1);
  const int64_t count = dim == 0 ? 0 : x.numel() / dim;
  if (x.is_contiguous())
    return {x, count, dim, dim};
  bool uniform = dim == 1 || x.stride(-1) == 1;
  int64_t stride = 0, expected = 0;
  for (int64_t axis = x.dim() - 2; axis >= 0 && uniform; --axis) {
    if (x.size(axis) == 1)
      continue;
    if (stride == 0)
      stride = expected = x.stride(axis);
    uniform = x.stride(axis) == expected && stride > 0;
    expected *= x.size(axis);
  }
  if (!uniform)
    return {torch::stable::contiguous(x), count, dim, dim};
  return {x, count, dim, stride == 0 ? dim : stride};
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return in_large_pages(torch::stable::new_empty(like, {shape.data(), shape.size()}));
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return in_large_pages(torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype));
}

inline Tensor empty_dense(const Tensor& like) {
  return empty(like, shape_of(like));
}

// Runs kernel(begin, end) over [0, items) on torch's threads. `cost` is roughly the floats touched per item:
// small calls stay on the calling thread.
template <class Kernel> void for_items(int64_t items, int64_t cost, const Kernel& kernel) {
  const IsaChoice& choice = active_isa();
  if (choice.error != nullptr)
    fail(choice.error);
  if (items <= 0)
    return;
  constexpr int64_t floats_per_thread = 16384;
  const int64_t grain = floats_per_thread / (cost > 0 ? cost : 1);
  if (items <= grain)
    return kernel(0, items);
  torch::stable::parallel_for(0, items, grain > 0 ? grain : 1, kernel);
}

} // namespace kvkeye
