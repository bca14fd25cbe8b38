#include "case.h"
#include "kvkeye/kv_cache.h"

using namespace kvkeye;

namespace {

void read_rows(host_cuda::Case& c, AppendKvParams& p) {
  // k and v may be two views of one buffer.
  const bool one = c.number("one_source") != 0;
  for (int side = 0; side < 2; ++side) {
    const std::string name = side == 0 ? "k" : "v";
    p.source[side] = c.buffer(one ? "qkv" : name) + c.number(name + "_offset");
    p.cache[side] = c.buffer(name + "_cache");
    p.token_stride[side] = c.number("token_stride");
    p.head_stride[side] = c.number("head_stride");
  }
  p.slot_mapping = c.buffer<int64_t>("slot_mapping");
  p.slots = c.number("slots");
  p.heads = c.number("heads");
  p.block_size = c.number("block_size");
  p.row_bytes = c.number("row_bytes");
}

} // namespace

KVKEYE_CALL(append_kv) {
  AppendKvParams p{};
  read_rows(c, p);
  return cuda::append_kv(p, c.number("tokens"), nullptr);
}

KVKEYE_CALL(quantize_kv) {
  QuantizeKvParams p{};
  read_rows(c, p);
  p.scales[0] = c.buffer<float>("k_scales");
  p.scales[1] = c.buffer<float>("v_scales");
  return cuda::quantize_kv(p, c.number("tokens"), nullptr);
}

KVKEYE_CALL(copy_blocks) {
  const CopyBlocksParams p{{c.buffer("k_cache"), c.buffer("v_cache")},
                           c.buffer<int64_t>("block_pairs"),
                           c.number("blocks"),
                           c.number("block_bytes")};
  return cuda::copy_blocks(p, c.number("pairs"), nullptr);
}
