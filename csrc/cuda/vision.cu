// Pictures to resized, normalised rows of patches, integer for integer what the CPU kernel gives.
//
// A block makes one row of up to kCudaTilePatches patches. A thread owns one column and channel of it: input
// row by input row it resamples horizontally, rounds to 8 bits, and adds the level to the 14 output rows that
// it keeps in registers. Integer sums have no order, so no resized row is ever held. Finished levels go
// through shared memory to the patches' layout, are replaced by their values there, and leave in whole
// vectors.
#include "kvkeye/vision_pack_cuda.h"

#include "device.h"

namespace kvkeye::cuda {
namespace {

constexpr int kPatch = (int)kCudaPatch;
constexpr int kArea = kPatch * kPatch;
constexpr int kTilePatches = (int)kCudaTilePatches;
constexpr int kItems = 3 * kPatch * kTilePatches; // columns and channels of a tile
constexpr int kThreads = (kItems + 31) / 32 * 32;
constexpr int kBlocksPerSm = 2; // 80 registers per thread: loads in flight rather than threads
constexpr int kChunk = 32;      // input rows whose weights are in shared memory at a time
constexpr int kTogether = 4;    // input rows resampled side by side: one weight loaded for all
constexpr int kRowVectors = 4;  // weights of one input row: 14 output rows, padded to four vectors

struct Tile {
  int4 weights[kChunk][kRowVectors];        // of the vertical pass
  uchar4 out[kTilePatches * 3 * kArea / 4]; // [patches, 3, 14, 14] levels
  float levels[3 * 256];
};
static_assert(sizeof(Tile) <= 16 << 10,
              "small enough that shared memory never decides how many blocks an SM holds");

// One output of an axis: weight i, of input first + i, stands `step` words behind weight i - 1.
struct Window {
  int first, count, step;
  const int32_t* weights;
};

__device__ Window window_of(const int32_t* tables, const PackCudaAxis& axis, int output) {
  const int32_t* start = tables + axis.start + output;
  return {__ldg(start), __ldg(start + axis.out), axis.out, start + 2 * (int64_t)axis.out};
}

__device__ int weight_of(const Window& window, int tap) {
  return __ldg(window.weights + (int64_t)tap * window.step);
}

__device__ int rounded(int sum, int precision) {
  return min(max((sum + (1 << (precision - 1))) >> precision, 0), 255);
}

// The last picture whose first tile is not behind `tile`.
__device__ int64_t image_of(const PackCudaImage* images, int64_t count, int64_t tile) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (images[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Weights of the input rows [first, first + kChunk) in the tile's output rows, zero where they have no part.
__device__ void load_weights(Tile& tile, const int32_t* tables, const PackCudaAxis& axis, int top,
                             int first) {
  int* weights = &tile.weights[0][0].x;
  for (int i = (int)threadIdx.x; i < kChunk * kRowVectors * 4; i += kThreads) {
    const int row = i % (4 * kRowVectors), input = first + i / (4 * kRowVectors);
    int weight = 0;
    if (row < kPatch) {
      const Window window = window_of(tables, axis, top + row);
      const int tap = input - window.first;
      if (tap >= 0 && tap < window.count)
        weight = weight_of(window, tap);
    }
    weights[i] = weight;
  }
}

// One channel of the picture, from the first input of an output column on.
struct Column {
  const uint8_t* pixels;
  int64_t row_stride;
  Window window;
  int precision;
};

// The column's levels in kTogether input rows, from `row` on; rows after `last` repeat it.
__device__ void resample_rows(const Column& column, int row, int last, int (&levels)[kTogether]) {
  const uint8_t* source[kTogether];
  int sums[kTogether];
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
    source[i] = column.pixels + min(row + i, last) * column.row_stride;
    sums[i] = 0;
  }
  const int32_t* weights = column.window.weights;
#pragma unroll 4
  for (int tap = 0; tap < column.window.count; ++tap) {
    const int weight = __ldg(weights);
    weights += column.window.step;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      sums[i] += weight * __ldg(source[i]);
      source[i] += 3;
    }
  }
#pragma unroll
  for (int i = 0; i < kTogether; ++i)
    levels[i] = rounded(sums[i], column.precision);
}

__device__ void add_row(int (&sums)[4 * kRowVectors], const int4 (&weights)[kRowVectors], int level) {
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int4 weight = weights[i];
    sums[4 * i] += weight.x * level;
    sums[4 * i + 1] += weight.y * level;
    sums[4 * i + 2] += weight.z * level;
    sums[4 * i + 3] += weight.w * level;
  }
}

// Fills tile.out. `top` is the first output row, `left` the first output column, of `columns` in all.
__device__ void resample(Tile& tile, const int32_t* tables, const PackCudaImage& image, int top, int left,
                         int columns) {
  const int x = (int)threadIdx.x / 3, channel = (int)threadIdx.x % 3;
  const bool active = x < columns;
  const Window across = window_of(tables, image.columns, left + (active ? x : 0));
  const Column column{image.pixels + 3 * (int64_t)across.first + channel, image.row_stride, across,
                      image.columns.precision};
  const Window end = window_of(tables, image.rows, top + kPatch - 1);
  const int first = window_of(tables, image.rows, top).first, last = end.first + end.count - 1;
  int sums[4 * kRowVectors] = {};
  for (int chunk = first; chunk <= last; chunk += kChunk) {
    load_weights(tile, tables, image.rows, top, chunk);
    __syncthreads();
    for (int i = 0; active && i < kChunk && chunk + i <= last; i += kTogether) {
      int levels[kTogether];
      resample_rows(column, chunk + i, last, levels);
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        add_row(sums, tile.weights[i + j], levels[j]);
    }
    __syncthreads();
  }
  if (!active)
    return;
  uint8_t* out = &tile.out[0].x + (x / kPatch * 3 + channel) * kArea + x % kPatch;
#pragma unroll
  for (int row = 0; row < kPatch; ++row)
    out[row * kPatch] = (uint8_t)rounded(sums[row], image.rows.precision);
}

__device__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The table holds rounded values: the upper half of each is its bf16.
__device__ void store(bf16* out, float a, float b, float c, float d) {
  *reinterpret_cast<uint2*>(out) = make_uint2(bits_of(a) >> 16 | (bits_of(b) & 0xffff0000u),
                                              bits_of(c) >> 16 | (bits_of(d) & 0xffff0000u));
}

__device__ void store(float* out, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(out) = make_float4(a, b, c, d);
}

// Patches that follow each other in a row of patches follow each other in out: the tile is one piece of it.
template <class T> __device__ void store_patches(const Tile& tile, T* out, int patches) {
  for (int i = (int)threadIdx.x; i < patches * 3 * kArea / 4; i += kThreads) {
    const float* levels = tile.levels + i / (kArea / 4) % 3 * 256;
    const uchar4 level = tile.out[i];
    store(out + 4 * (int64_t)i, levels[level.x], levels[level.y], levels[level.z], levels[level.w]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) pack_patches_kernel(PackCudaParams<T> p) {
  Tile& tile = shared_memory<Tile>();
  const PackCudaImage& image = p.images[image_of(p.images, p.num_images, blockIdx.x)];
  const int tile_in_image = (int)(blockIdx.x - image.first_tile);
  const int patch_row = tile_in_image / image.tile_columns;
  const int patch_column = tile_in_image % image.tile_columns * kTilePatches;
  const int patches = min(kTilePatches, image.patch_columns - patch_column);
  for (int i = (int)threadIdx.x; i < 3 * 256; i += kThreads)
    tile.levels[i] = p.levels[i];
  resample(tile, p.tables, image, patch_row * kPatch, patch_column * kPatch, patches * kPatch);
  __syncthreads();
  const int64_t patch = image.first_patch + (int64_t)patch_row * image.patch_columns + patch_column;
  store_patches(tile, p.out + patch * 3 * kArea, patches);
}

} // namespace

template <class T> int pack_patches(const PackCudaParams<T>& p, void* stream) {
  if (p.tiles == 0)
    return cudaSuccess;
  if (p.tiles > 0x7fffffff)
    return cudaErrorInvalidConfiguration;
  return launch<pack_patches_kernel<T>>(dim3((unsigned)p.tiles), dim3(kThreads), sizeof(Tile), stream, p);
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing((cudaStream_t)stream, &status) != cudaSuccess ||
         status != cudaStreamCaptureStatusNone;
}

template int pack_patches<float>(const PackCudaParams<float>&, void*);
template int pack_patches<bf16>(const PackCudaParams<bf16>&, void*);

} // namespace kvkeye::cuda
