// pack_patches on the GPU: pictures to a plan, one copy of the plan, one launch. Reads no pixel on the host
// and waits for nothing.
#include "cuda_launch.h"
#include "cuda_pack_plan.h"
#include "pack_plan.h"

namespace kvkeye {
namespace {

constexpr const char* kOp = "pack_patches";

// [H, W, 3] with dense pixels; a copy where they are not.
Tensor picture_of(const Tensor& image) {
  const Argument argument{kOp, "images", image};
  argument.has_dtype(ScalarType::Byte);
  argument.has_dim(3, "[H, W, 3]");
  argument.has_shape({image.size(0), image.size(1), 3});
  require(image.size(0) > 0 && image.size(1) > 0, kOp, ": an image has shape ", shape_text(image),
          "; both sides must be at least 1.");
  return image.stride(2) == 1 && image.stride(1) == 3 ? image : torch::stable::contiguous(image);
}

void check_arguments(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes,
                     const std::vector<double>& mean, const std::vector<double>& std, int64_t patch_size) {
  require(!images.empty(), kOp, ": images is empty; the GPU kernel takes at least one.");
  require(sizes.size() == 2 * images.size(), kOp, ": sizes has ", sizes.size(), " numbers for ",
          images.size(), " images; expected rows and columns of each.");
  require(mean.size() == 3 && std.size() == 3, kOp, ": mean and std need three numbers each.");
  require(patch_size == kCudaPatch, kOp, ": patch_size is ", patch_size, "; the GPU kernel takes ",
          kCudaPatch, ". Use the eager backend.");
  for (const int64_t size : sizes)
    require(size > 0 && size % kCudaPatch == 0, kOp, ": a target side is ", size,
            "; expected a positive multiple of ", kCudaPatch, ".");
}

// The plan on the device of `like`. The pinned piece goes back to torch's host allocator, which keeps it from
// reuse until the copy is done.
Tensor on_device(const CudaPackPlan& plan, const float* levels, const Tensor& like) {
  const std::vector<int64_t> bytes{plan.bytes()};
  const Tensor pinned = torch::stable::empty({bytes.data(), 1}, ScalarType::Byte, std::nullopt,
                                             torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
  plan.write(write<char>(pinned), levels);
  Tensor device = empty(like, bytes, ScalarType::Byte);
  torch::stable::copy_(device, pinned, true);
  return device;
}

Tensor pack_patches(std::vector<Tensor> images, std::vector<int64_t> sizes, std::vector<double> mean,
                    std::vector<double> std, bool bilinear, int64_t patch_size, ScalarType dtype) {
  check_arguments(images, sizes, mean, std, patch_size);
  const Launch launch(images[0]);
  require(!cuda::is_capturing(launch.stream), kOp,
          ": the stream is being captured into a graph; the weight tables of a call live only as long as the "
          "call. "
          "Pack before the capture.");
  CudaPackPlan plan(bilinear ? Filter::bilinear : Filter::bicubic);
  for (size_t i = 0; i < images.size(); ++i) {
    Tensor& image = images[i] = picture_of(images[i]);
    plan.add(read<uint8_t>(image), image.size(0), image.size(1), image.stride(0), sizes[2 * i],
             sizes[2 * i + 1]);
  }
  const Tensor out = empty(images[0], {plan.patches(), 3 * kCudaPatch * kCudaPatch}, dtype);
  with_type({kOp, "the result", out}, [&](auto zero) {
    using T = decltype(zero);
    const LevelValues<T> levels(mean, std);
    const Tensor memory = on_device(plan, levels.table, images[0]);
    check_launch(kOp, cuda::pack_patches(plan.params(read<char>(memory), write<T>(out)), launch.stream));
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("pack_patches", TORCH_BOX(&pack_patches));
}

} // namespace kvkeye
