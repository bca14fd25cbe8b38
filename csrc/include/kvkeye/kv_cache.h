// The paged cache: slot = block * block_size + offset, cache [blocks, heads, block_size, row]. Kernels move
// bytes; only those into e4m3 know what a row holds.
#pragma once

#include "kvkeye/common/e4m3.h"
#include "kvkeye/common/kernel.h"

namespace kvkeye {

// Items are tokens.
struct AppendKvParams {
  const char* source[2];       // k, v: [tokens, heads, row_bytes], strided
  char* cache[2];              // k_cache, v_cache: [blocks, heads, block_size, row_bytes]
  const int64_t* slot_mapping; // [tokens], negative: do not write
  int64_t slots;               // blocks * block_size: every slot is below it
  int64_t heads, block_size, row_bytes;
  int64_t token_stride[2], head_stride[2]; // in bytes
};

// From rows of bf16 to caches of e4m3, of which row_bytes speaks; on the GPU.
struct QuantizeKvParams : AppendKvParams {
  float* scales[2]; // [blocks, heads, block_size]
};

// Items are pairs. Targets are distinct and no target is a source.
struct CopyBlocksParams {
  char* cache[2];             // k_cache, v_cache: [blocks, block_bytes]
  const int64_t* block_pairs; // [pairs, 2]: source, target
  int64_t blocks, block_bytes;
};

KVKEYE_UNTYPED_KERNEL(append_kv, AppendKvParams)
KVKEYE_UNTYPED_KERNEL(copy_blocks, CopyBlocksParams)

// CUDA launchers: pointers are device pointers, `stream` is a cudaStream_t; they return a cudaError_t. A slot
// or block out of range traps: it is not known on the host without a synchronisation.
namespace cuda {
int append_kv(const AppendKvParams& params, int64_t tokens, void* stream);
int quantize_kv(const QuantizeKvParams& params, int64_t tokens, void* stream);
int copy_blocks(const CopyBlocksParams& params, int64_t pairs, void* stream);
} // namespace cuda

} // namespace kvkeye
