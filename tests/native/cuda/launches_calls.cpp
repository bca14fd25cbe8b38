// Every kernel's launch, printed: what a block of threads takes.
#include "case.h"
#include "kvkeye/attention_cuda.h"
#include "kvkeye/kv_cache.h"
#include "kvkeye/rope_cuda.h"
#include "kvkeye/speculative_cuda.h"
#include "kvkeye/video_fusion_cuda.h"
#include "kvkeye/vision_pack_cuda.h"

using namespace kvkeye;

namespace {

void print_cache_writes() {
  for (const int64_t bytes : {16, 4, 2}) {
    AppendKvParams p{};
    p.heads = 1;
    p.row_bytes = bytes;
    cuda::append_kv(p, 1, nullptr);
    CopyBlocksParams copies{};
    copies.block_bytes = bytes;
    if (bytes != 4)
      cuda::copy_blocks(copies, 1, nullptr);
  }
  QuantizeKvParams quantize{};
  quantize.heads = quantize.row_bytes = 1;
  cuda::quantize_kv(quantize, 1, nullptr);
}

template <class T> void print_attention() {
  PagedCudaParams<T> p{};
  p.num_tokens = p.num_sequences = p.num_kv_heads = 1;
  for (const int64_t dim : {64, 72, 80, 128})
    for (const int groups : {1, 2})
      cuda::paged_attention(p, {groups, 1, 1}, dim, nullptr);
}

template <class T, class C> void print_append() {
  QkNormMropeAppendCudaParams<T, C> append{};
  append.tokens = append.num_q_heads = append.num_kv_heads = 1;
  for (const int64_t dim : {64, 128, 256})
    cuda::qk_norm_mrope_append(append, dim, nullptr);
}

template <class T> void print_typed() {
  print_append<T, T>();
  SampleCudaParams<T> row{};
  row.rows = row.vocabulary = 1;
  cuda::sample(row, nullptr);
  VerifyDraftCudaParams<T> trees{};
  trees.sample = row;
  trees.trees = 1;
  cuda::verify_draft(trees, nullptr);
  const float probability = 1.0f;
  trees.draft_probs = &probability;
  cuda::verify_draft(trees, nullptr);
  PackCudaParams<T> pack{};
  pack.tiles = 1;
  cuda::pack_patches(pack, nullptr);
  for (const int64_t branches : {1, 2})
    for (const int64_t plane : {1, 8}) { // elements one by one, and in vectors
      FuseTilesCudaParams<T> fuse{};
      fuse.branches = branches;
      fuse.channels = fuse.frames = fuse.length = 1;
      fuse.plane = plane;
      cuda::fuse_tiles(fuse, nullptr);
    }
}

} // namespace

KVKEYE_CALL(launches) {
  (void)c;
  host_cuda::print_launches();
  print_cache_writes();
  print_attention<bf16>();
  print_attention<e4m3>();
  print_append<bf16, e4m3>();
  print_typed<float>();
  print_typed<bf16>();
  return 0;
}
