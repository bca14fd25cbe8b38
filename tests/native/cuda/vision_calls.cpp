#include "case.h"
#include "cuda_pack_plan.h"

using namespace kvkeye;

namespace {

CudaPackPlan plan_of(host_cuda::Case& c) {
  CudaPackPlan plan(c.number("bilinear") != 0 ? Filter::bilinear : Filter::bicubic);
  for (int64_t i = 0; i < c.number("images"); ++i) {
    const auto number = [&](const char* name) { return c.number(name + std::to_string(i)); };
    plan.add(c.buffer<uint8_t>("image" + std::to_string(i)), number("height"), number("width"),
             number("row_stride"), number("rows"), number("columns"));
  }
  return plan;
}

template <class T> int pack(host_cuda::Case& c) {
  const CudaPackPlan plan = plan_of(c);
  const auto memory = std::make_unique<char[]>((size_t)plan.bytes()); // of the exact size: reads are guarded
  plan.write(memory.get(), c.buffer<float>("levels"));
  host_cuda::watch("plan", memory.get(), (size_t)plan.bytes());
  const int status = cuda::pack_patches(plan.params(memory.get(), c.buffer<T>("out")), nullptr);
  host_cuda::forget(memory.get());
  return status;
}

} // namespace

KVKEYE_CALL(pack_patches) {
  return c.number("bf16") != 0 ? pack<bf16>(c) : pack<float>(c);
}
