// Pictures to patches and to other sizes: tensors to plans to kernels.
#include "checks.h"
#include "pack_plan.h"

namespace kvkeye {
namespace {

constexpr int64_t kLongestSide = 1 << 24;

// One picture with contiguous rows of pixels; a copy where the view has none.
Tensor picture_of(const char* op, const Tensor& image) {
  const Argument argument{op, "image", image};
  argument.has_dtype(ScalarType::Byte);
  argument.has_dim(3, "[height, width, 3]");
  const int64_t height = image.size(0), width = image.size(1);
  require(image.size(2) == 3 && height > 0 && width > 0 && height <= kLongestSide && width <= kLongestSide,
          op, ": an image has shape ", shape_text(image),
          "; expected [height, width, 3] with sides from 1 to ", kLongestSide, ".");
  const bool rows =
      image.stride(2) == 1 && (width == 1 || image.stride(1) == 3) && image.stride(0) >= 3 * width;
  return rows ? image : torch::stable::contiguous(image);
}

void add_picture(PackPlan& plan, const Tensor& image, int64_t rows, int64_t columns, int64_t patch,
                 int64_t band) {
  const int64_t stride = image.size(0) == 1 ? 3 * image.size(1) : image.stride(0);
  plan.add(read<uint8_t>(image), image.size(0), image.size(1), stride, rows, columns, patch, band);
}

// Runs a kernel over a plan's items, with scratch for each thread.
template <class Params, class Kernel>
void run(const PackPlan& plan, const Params& params, const Kernel& kernel) {
  for_items(plan.items, 3 * kTileColumns * kItemRows, [&](int64_t begin, int64_t end) {
    AlignedBytes scratch(plan.scratch);
    Params own = params;
    own.scratch = scratch.data();
    kernel(own, begin, end);
  });
}

Tensor pack_patches(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes,
                    const std::vector<double>& mean, const std::vector<double>& std, bool bilinear,
                    int64_t patch_size, ScalarType dtype) {
  const char* op = "pack_patches";
  require(!images.empty() && sizes.size() == 2 * images.size(), op, ": ", images.size(), " images and ",
          sizes.size(), " numbers in sizes; expected at least one image, and (rows, columns) for each.");
  require(mean.size() == 3 && std.size() == 3, op, ": mean and std have ", mean.size(), " and ", std.size(),
          " values; expected one per channel.");
  require(patch_size >= 1, op, ": patch_size is ", patch_size, "; expected at least 1.");
  PackPlan plan(bilinear ? Filter::bilinear : Filter::bicubic);
  std::vector<Tensor> pictures;
  std::vector<int64_t> first_row;
  int64_t patches = 0;
  for (size_t i = 0; i < images.size(); ++i) {
    const int64_t rows = sizes[2 * i], columns = sizes[2 * i + 1];
    require(rows > 0 && columns > 0 && rows % patch_size == 0 && columns % patch_size == 0 &&
                rows <= kLongestSide && columns <= kLongestSide,
            op, ": sizes holds (", rows, ", ", columns, "); expected positive multiples of ", patch_size,
            ".");
    pictures.push_back(picture_of(op, images[i]));
    add_picture(plan, pictures.back(), rows, columns, patch_size, patch_size);
    first_row.push_back(patches);
    patches += (rows / patch_size) * (columns / patch_size);
  }
  const Tensor out = empty(images[0], {patches, 3 * patch_size * patch_size}, dtype);
  with_type({op, "the result", out}, [&](auto type) {
    using T = decltype(type);
    const LevelValues<T> values(mean, std);
    const PackPatchesParams<T> params{plan.images.data(),
                                      (int64_t)plan.images.size(),
                                      first_row.data(),
                                      write<T>(out),
                                      values.table,
                                      values.scale,
                                      values.shift,
                                      values.affine,
                                      nullptr};
    run(plan, params,
        [](const auto& own, int64_t begin, int64_t end) { cpu::pack_patches(own, begin, end); });
  });
  return out;
}

Tensor resize_image(const Tensor& image, int64_t rows, int64_t columns, bool bilinear) {
  const char* op = "resize_image";
  require(rows > 0 && columns > 0 && rows <= kLongestSide && columns <= kLongestSide, op, ": the size is ",
          rows, " x ", columns, "; expected sides from 1 to ", kLongestSide, ".");
  const Tensor picture = picture_of(op, image), out = empty(image, {rows, columns, 3});
  PackPlan plan(bilinear ? Filter::bilinear : Filter::bicubic);
  add_picture(plan, picture, rows, columns, columns, 1);
  const ResizeImageParams params{plan.images.data(), write<uint8_t>(out), nullptr};
  run(plan, params, [](const auto& own, int64_t begin, int64_t end) { cpu::resize_image(own, begin, end); });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("pack_patches", TORCH_BOX(&pack_patches));
  m.impl("resize_image", TORCH_BOX(&resize_image));
}

} // namespace kvkeye
