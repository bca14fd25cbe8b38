// The paged cache on the GPU: tensors to Params to launchers. Reads no tensor value on the host.
#include "kv_cache.h"

#include <torch/csrc/stable/accelerator.h>

namespace kvkeye {
namespace {

// The current stream of the tensor's device, which is made the current device meanwhile.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
};

void check(const char* op, int status) {
  require(status == 0, op, ": the launch failed with CUDA error ", status, ".");
}

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  const Launch launch(k_cache);
  const Append append = append_of(k, v, k_cache, v_cache, slot_mapping);
  check("append_kv", cuda::append_kv(append.params, append.tokens, launch.stream));
}

void copy_blocks(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const Launch launch(k_cache);
  const Copy copy = copy_of(k_cache, v_cache, block_pairs);
  check("copy_blocks", cuda::copy_blocks(copy.params, copy.pairs, launch.stream));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
}

} // namespace kvkeye
