// The paged cache on the GPU: tensors to Params to launchers. Reads no tensor value on the host.
#include "cuda_launch.h"
#include "kv_cache.h"

namespace kvkeye {
namespace {

void append_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  const Launch launch(k_cache);
  const Append append = append_of(k, v, k_cache, v_cache, slot_mapping);
  check_launch("append_kv", cuda::append_kv(append.params, append.tokens, launch.stream));
}

void copy_blocks(const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_pairs) {
  const Launch launch(k_cache);
  const Copy copy = copy_of(k_cache, v_cache, block_pairs);
  check_launch("copy_blocks", cuda::copy_blocks(copy.params, copy.pairs, launch.stream));
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cuda, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
}

} // namespace kvkeye
