// Writes into the paged cache.
#include "kvkeye/kv_cache.h"

#include <cstring>

namespace kvkeye::KVKEYE_ISA {

void append_kv(const AppendKvParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0)
      continue;
    for (int side = 0; side < 2; ++side) {
      for (int64_t head = 0; head < p.heads; ++head) {
        const int64_t row = (slot / p.block_size * p.heads + head) * p.block_size + slot % p.block_size;
        const char* source = p.source[side] + token * p.token_stride[side] + head * p.head_stride[side];
        std::memcpy(p.cache[side] + row * p.row_bytes, source, p.row_bytes);
      }
    }
  }
}

void copy_blocks(const CopyBlocksParams& p, int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t source = p.block_pairs[2 * pair], target = p.block_pairs[2 * pair + 1];
    if (source == target)
      continue;
    for (char* cache : p.cache)
      std::memcpy(cache + target * p.block_bytes, cache + source * p.block_bytes, p.block_bytes);
  }
}

} // namespace kvkeye::KVKEYE_ISA
