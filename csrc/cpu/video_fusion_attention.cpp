// tile_attention, forward: parts of keys once, then each tile as a weighted sum of parts.
#include "video_fusion_attention.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// o = sum over parts of (sum over the tiles with the part of weight times share) times the part's sums.
template <class T> void blend_row(const PartResults<T>& results, int64_t row, float* shares) {
  const auto& p = results.p;
  const TileBlock& block = results.block;
  float* lse = p.lse + (results.batch * p.heads + results.head) * p.lse_size;
  clear(shares, block.num_parts, 0.0f);
  for (int64_t member = 0; member < block.num_members; ++member) {
    const TilePlace place = place_of(p.tiling, block.begin + row, block.members[member]);
    const Denominator joint = results.join(row, member);
    const float weight = weight_of(p.tiling, place);
    lse[place.lse] = joint.log2() * kLn2;
    for (int64_t part = 0; part < block.num_parts; ++part)
      if (results.joins(part, member))
        shares[part] += weight * results.share(part, row, joint);
  }
  T* target = p.o + results.dense(row);
  for_vectors(p.dim, [&](int64_t i, int lanes) KVKEYE_LAMBDA {
    Vf total{};
    for (int64_t part = 0; part < block.num_parts; ++part)
      total = fma(splat(shares[part]),
                  load(results.o + (part * results.rows + row) * results.width + i, lanes), total);
    store(target + i, total, lanes);
  });
}

} // namespace

template <class T> void tile_attention(const TileAttentionParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    Arena arena(p.scratch);
    const PartResults<T> results(p, p.tiling.blocks[item % p.tiling.num_blocks], item / p.tiling.num_blocks,
                                 arena);
    float* shares = arena.take(results.block.num_parts);
    results.attend(arena.next, false);
    for (int64_t row = 0; row < results.rows; ++row)
      blend_row(results, row, shares);
  }
}

KVKEYE_INSTANTIATE(tile_attention, TileAttentionParams)

} // namespace kvkeye::KVKEYE_ISA
