// Large pages where many bytes are read or written from end to end. Only advice: nothing changes if there are
// none.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kvkeye {

inline void advise_large_pages(const torch::stable::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + tensor.numel() * tensor.element_size()) / kPage * kPage;
  if (last > first)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// The system hands out fresh memory as it is first written, which for a large result takes as long as the
// rest of an op bound by memory; malloc takes blocks from 32 MiB on fresh at every call.
inline torch::stable::Tensor in_large_pages(torch::stable::Tensor fresh) {
  constexpr int64_t kWorthwhile = int64_t{8} << 20;
  if (fresh.is_cpu() && fresh.numel() * static_cast<int64_t>(fresh.element_size()) >= kWorthwhile)
    advise_large_pages(fresh);
  return fresh;
}

} // namespace kvkeye
