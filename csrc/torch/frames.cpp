// Frames compared by their colours: tensors to Params to kernels.
#include "kvkeye/frames.h"
#include "checks.h"

namespace kvkeye {
namespace {

Tensor hsv_patches(const Tensor& image, int64_t patch_size) {
  const char* op = "hsv_patches";
  const Argument argument{op, "image", image};
  argument.has_dtype(ScalarType::Byte);
  argument.has_dim(3, "[height, width, 3]");
  const int64_t height = image.size(0), width = image.size(1);
  require(image.size(2) == 3 && patch_size > 0 && height > 0 && width > 0 && height % patch_size == 0 &&
              width % patch_size == 0,
          op, ": image has shape ", shape_text(image),
          "; expected [height, width, 3] with sides that are positive multiples of patch_size = ", patch_size,
          ".");
  const Tensor pixels = dense(image);
  const Tensor out = empty(image, {height * width / (patch_size * patch_size), 3 * patch_size * patch_size});
  const HsvPatchesParams params{read<uint8_t>(pixels), write<uint8_t>(out), width, 3 * width, patch_size};
  for_items(height, 3 * width, [&](int64_t begin, int64_t end) { cpu::hsv_patches(params, begin, end); });
  return out;
}

Tensor patch_products(const Tensor& a, const Tensor& b) {
  const char* op = "patch_products";
  const Argument first{op, "a", a}, second{op, "b", b};
  first.has_dtype(ScalarType::Byte);
  second.has_dtype(ScalarType::Byte);
  first.has_dim(2, "[n, d]");
  second.has_shape_of("a", a);
  const Rows left = as_rows(first), right = as_rows(second);
  const Tensor out = empty(a, {a.size(0)}, ScalarType::Long);
  const PatchProductsParams params{read<uint8_t>(left.tensor),
                                   read<uint8_t>(right.tensor),
                                   write<int64_t>(out),
                                   a.size(1),
                                   left.stride,
                                   right.stride};
  for_items(a.size(0), a.size(1) / 4,
            [&](int64_t begin, int64_t end) { cpu::patch_products(params, begin, end); });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("hsv_patches", TORCH_BOX(&hsv_patches));
  m.impl("patch_products", TORCH_BOX(&patch_products));
}

} // namespace kvkeye
