// What the bindings of libkvkeye_cuda share: where a launch goes, and what its status says.
#pragma once

#include "checks.h"

#include <torch/csrc/stable/accelerator.h>

namespace kvkeye {

// The current stream of the tensor's device, which is made the current device meanwhile.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  }
};

// The tensor at an address that is a multiple of so many bytes; a copy where it is not.
inline Tensor aligned(const Tensor& tensor, uintptr_t bytes) {
  return (uintptr_t)tensor.const_data_ptr() % bytes == 0 ? tensor : torch::stable::clone(tensor);
}

inline void check_launch(const char* op, int status) {
  require(status == 0, op, ": the launch failed with CUDA error ", status, ".");
}

} // namespace kvkeye
