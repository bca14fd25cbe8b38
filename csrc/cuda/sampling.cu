// Drawing the next token: one block of threads per row, one launch, nothing of the vocabulary's size in
// memory.
#include "sampling_draw.h"

namespace kvkeye::cuda {
namespace {

struct Shared {
  Counts counts;
  CutMemory cut;
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    sample_kernel(const __grid_constant__ SampleCudaParams<T> p) {
  Shared& shared = shared_memory<Shared>();
  const int64_t at = blockIdx.x;
  Row<T> row(p, shared.counts, {at, at, nullptr, 0});
  const int64_t token = draw(row, shared.cut);
  if (threadIdx.x == 0)
    p.tokens[at] = token;
}

} // namespace

template <class T> int sample(const SampleCudaParams<T>& p, void* stream) {
  if (p.rows == 0)
    return cudaSuccess;
  if (p.vocabulary > kCudaMostTokens)
    return cudaErrorInvalidValue;
  return launch<sample_kernel<T>>(dim3((unsigned)p.rows), dim3(kBlockThreads), sizeof(Shared), stream, p);
}

template int sample<float>(const SampleCudaParams<float>&, void*);
template int sample<bf16>(const SampleCudaParams<bf16>&, void*);

} // namespace kvkeye::cuda
