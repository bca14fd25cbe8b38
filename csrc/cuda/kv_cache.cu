// Writes into the paged cache on the GPU: bytes, which serves every dtype, or e4m3 levels with scales.
#include "kvkeye/kv_cache.h"

#include "e4m3.h"

namespace kvkeye::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <class Word>
__device__ void copy_words(const char* source, char* target, int64_t bytes, int64_t first, int64_t step) {
  const Word* from = reinterpret_cast<const Word*>(source);
  Word* to = reinterpret_cast<Word*>(target);
  for (int64_t i = first; i < bytes / (int64_t)sizeof(Word); i += step)
    to[i] = from[i];
}

// One block of threads per token; its rows, keys then values, are walked head by head.
template <class Word> __global__ void append_kv_kernel(AppendKvParams p) {
  const int64_t token = blockIdx.x, slot = p.slot_mapping[token];
  if (slot < 0)
    return;
  if (slot >= p.slots)
    __trap();
  const int64_t words = p.row_bytes / (int64_t)sizeof(Word);
  const int64_t first_row = slot / p.block_size * p.heads * p.block_size + slot % p.block_size;
#pragma unroll // an index known only at run time would move the params to local memory
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = threadIdx.x; i < p.heads * words; i += blockDim.x) {
      const int64_t head = i / words, word = i % words;
      const char* source = p.source[side] + token * p.token_stride[side] + head * p.head_stride[side];
      char* target = p.cache[side] + (first_row + head * p.block_size) * p.row_bytes;
      reinterpret_cast<Word*>(target)[word] = reinterpret_cast<const Word*>(source)[word];
    }
  }
}

__device__ __forceinline__ float value_of(bf16 value) {
  return __uint_as_float((uint32_t)value.bits << 16);
}

// One block of threads per token, a warp per row.
__global__ void quantize_kv_kernel(QuantizeKvParams p) {
  const int64_t slot = p.slot_mapping[blockIdx.x];
  if (slot < 0)
    return;
  if (slot >= p.slots)
    __trap();
  const int64_t block = slot / p.block_size, offset = slot % p.block_size;
  const int lane = (int)threadIdx.x % 32;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    for (int64_t head = threadIdx.x / 32; head < p.heads; head += kThreads / 32) {
      const auto* source = reinterpret_cast<const bf16*>(
          p.source[side] + (int64_t)blockIdx.x * p.token_stride[side] + head * p.head_stride[side]);
      const int64_t row = (block * p.heads + head) * p.block_size + offset;
      uint32_t largest = 0;
      for (int64_t i = lane; i < p.row_bytes; i += 32)
        largest = max(largest, magnitude_of(value_of(source[i])));
#pragma unroll
      for (int other = 16; other > 0; other /= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, other));
      const float scale = scale_of(largest);
      for (int64_t i = lane; i < p.row_bytes; i += 32)
        p.cache[side][row * p.row_bytes + i] = (char)level_of(value_of(source[i]), scale);
      if (lane == 0)
        p.scales[side][row] = scale;
    }
  }
}

// Grid: pairs, parts of a block.
template <class Word> __global__ void copy_blocks_kernel(CopyBlocksParams p) {
  const int64_t source = p.block_pairs[2 * (int64_t)blockIdx.x],
                target = p.block_pairs[2 * (int64_t)blockIdx.x + 1];
  if (source < 0 || source >= p.blocks || target < 0 || target >= p.blocks)
    __trap();
  if (source == target)
    return;
  const int64_t first = (int64_t)blockIdx.y * blockDim.x + threadIdx.x,
                step = (int64_t)gridDim.y * blockDim.x;
  for (int side = 0; side < 2; ++side)
    copy_words<Word>(p.cache[side] + source * p.block_bytes, p.cache[side] + target * p.block_bytes,
                     p.block_bytes, first, step);
}

// Every address and stride of a copy must be a multiple of the word.
template <class... Values> int64_t common_bits(Values... values) {
  return (int64_t(values) | ...);
}

} // namespace

int append_kv(const AppendKvParams& p, int64_t tokens, void* stream) {
  if (tokens == 0 || p.heads * p.row_bytes == 0)
    return cudaSuccess;
  int64_t bits = p.row_bytes;
  for (int side = 0; side < 2; ++side)
    bits |= common_bits(p.source[side], p.cache[side], p.token_stride[side], p.head_stride[side]);
  const dim3 grid((unsigned)tokens);
  if (bits % 16 == 0)
    return launch<append_kv_kernel<uint4>>(grid, kThreads, 0, stream, p);
  if (bits % 4 == 0)
    return launch<append_kv_kernel<uint32_t>>(grid, kThreads, 0, stream, p);
  return launch<append_kv_kernel<uint16_t>>(grid, kThreads, 0, stream, p);
}

int quantize_kv(const QuantizeKvParams& p, int64_t tokens, void* stream) {
  if (tokens == 0 || p.heads * p.row_bytes == 0)
    return cudaSuccess;
  return launch<quantize_kv_kernel>(dim3((unsigned)tokens), kThreads, 0, stream, p);
}

int copy_blocks(const CopyBlocksParams& p, int64_t pairs, void* stream) {
  if (pairs == 0 || p.block_bytes == 0)
    return cudaSuccess;
  const int64_t bits = common_bits(p.cache[0], p.cache[1], p.block_bytes);
  const int64_t parts = p.block_bytes / (kThreads * 16) + 1;
  const dim3 grid((unsigned)pairs, (unsigned)(parts < kMaxGridY ? parts : kMaxGridY));
  if (bits % 16 == 0)
    return launch<copy_blocks_kernel<uint4>>(grid, kThreads, 0, stream, p);
  return launch<copy_blocks_kernel<uint16_t>>(grid, kThreads, 0, stream, p);
}

} // namespace kvkeye::cuda
