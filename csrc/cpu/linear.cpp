// Matrix product with one order of summation for every number of rows.
//
// A tile of M rows times N outputs keeps M * N vectors of partial sums in registers and walks over the
// inputs: M + N loads feed M * N multiply-adds. Tiles differ in shape only, never in the arithmetic of one
// element.
#include "kvkeye/linear.h"
#include "kvkeye/common/simd.h"

namespace kvkeye::KVKEYE_ISA {
namespace {

// How one vector of inputs is loaded and multiplied.
template <class T> struct Product {
  typedef Vf Operand;
  static constexpr int step = kLanes;
  KVKEYE_INLINE Operand load(const T* source, int count) { return KVKEYE_ISA::load(source, count); }
  KVKEYE_INLINE Vf add(Operand x, Operand w, Vf total) { return fma(x, w, total); }
};

#if defined(__AVX512BF16__)
// Two neighbouring products enter each lane at once.
template <> struct Product<bf16> {
  typedef __m512i Operand;
  static constexpr int step = 2 * kLanes;
  KVKEYE_INLINE Operand load(const bf16* source, int count) {
    if (count == step)
      return _mm512_loadu_si512(source);
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), source);
  }
  KVKEYE_INLINE Vf add(Operand x, Operand w, Vf total) {
    return (Vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)x, (__m512bh)w);
  }
};
#endif

template <class T, int M, int N> struct Tile {
  const T* x[M];
  const T* weight[N];
  Vf total[M][N];

  KVKEYE_INLINE void add(Tile& tile, int64_t k, int count) {
    typename Product<T>::Operand w[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      w[n] = Product<T>::load(tile.weight[n] + k, count);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto x = Product<T>::load(tile.x[m] + k, count);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        tile.total[m][n] = Product<T>::add(x, w[n], tile.total[m][n]);
    }
  }
};

// Lane n: the sum over the lanes of total[n], in the order of sum().
template <int N> KVKEYE_INLINE Vf sum_each(const Vf* total) {
#if defined(__AVX512F__)
  static_assert(N == 4);
  const __m512 a = (__m512)total[0], b = (__m512)total[1], c = (__m512)total[2], d = (__m512)total[3];
  const __m512 ab = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x44),
                                  _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, c, d, 0x44),
                                  _mm512_maskz_shuffle_f32x4(0xffff, c, d, 0xee));
  Vf four = (Vf)_mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, ab, cd, 0x88),
                              _mm512_maskz_shuffle_f32x4(0xffff, ab, cd, 0xdd));
  four += (Vf)_mm512_maskz_permute_ps(0xffff, (__m512)four, 0xee);
  four += (Vf)_mm512_maskz_permute_ps(0xffff, (__m512)four, 0x55);
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return (Vf)_mm512_maskz_permutexvar_ps(0xf, firsts, (__m512)four);
#else
  Vf found{};
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
    found[n] = sum(total[n]);
  return found;
#endif
}

// Elements [row, row + M) x [output, output + N). Past the edge the last row or output is computed again and
// dropped, so that an edge needs no other code.
template <class T, int M, int N>
void multiply(const PackedLinearParams<T>& p, int64_t row, int64_t row_end, int64_t output,
              int64_t output_end) {
  constexpr int step = Product<T>::step;
  Tile<T, M, N> tile;
  for (int m = 0; m < M; ++m)
    tile.x[m] = p.x + (row + m < row_end ? row + m : row_end - 1) * p.x_stride;
  for (int n = 0; n < N; ++n)
    tile.weight[n] = p.weight + (output + n < output_end ? output + n : output_end - 1) * p.weight_stride;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      tile.total[m][n] = Vf{};
  int64_t k = 0;
  for (; k + step <= p.inputs; k += step)
    Tile<T, M, N>::add(tile, k, step);
  if (k < p.inputs)
    Tile<T, M, N>::add(tile, k, (int)(p.inputs - k));
  constexpr int group = N < 4 ? N : 4;
#pragma GCC unroll 8
  for (int n = 0; n < N; n += group) {
    const int64_t left = output_end - output - n;
    const int count = left < group ? (int)left : group;
    if (count <= 0)
      break;
    const Vf bias = p.bias == nullptr ? Vf{} : load(p.bias + output + n, count);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vf found = sum_each<group>(tile.total[m] + n) + bias;
      if (row + m < row_end)
        store(p.y + (row + m) * p.outputs + output + n, found, count);
    }
  }
}

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileOutputs = 4; // 24 sums, 4 weights and 1 input in 32 registers
#else
constexpr int kTileRows = 4, kTileOutputs = 2; // 8 sums, 2 weights, 1 input and temporaries in 16 registers
#endif
constexpr int kStreams = 8; // with one row, outputs side by side hide the latency of memory

template <class T, int M>
void multiply_rows(const PackedLinearParams<T>& p, int64_t row, int64_t row_end, int64_t output,
                   int64_t output_end) {
  constexpr int N = M == 1 ? kStreams : kTileOutputs;
  for (; output < output_end; output += N)
    multiply<T, M, N>(p, row, row_end, output, output_end);
}

// Rows outside, outputs inside: a tile's rows stay in the first-level cache, the block's weights in the
// second.
template <class T>
void multiply_block(const PackedLinearParams<T>& p, int64_t row, int64_t row_end, int64_t output,
                    int64_t output_end) {
  for (; row + kTileRows - 1 <= row_end; row += kTileRows) // also with one row missing
    multiply_rows<T, kTileRows>(p, row, row_end, output, output_end);
  for (; row + 1 < row_end; row += 2)
    multiply_rows<T, 2>(p, row, row_end, output, output_end);
  if (row < row_end)
    multiply_rows<T, 1>(p, row, row_end, output, output_end);
}

} // namespace

template <class T> void packed_linear(const PackedLinearParams<T>& p, int64_t begin, int64_t end) {
  const int64_t output_blocks = p.output_blocks();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t output = item % output_blocks * p.output_block, row = item / output_blocks * p.row_block;
    const int64_t output_end = output + p.output_block, row_end = row + p.row_block;
    multiply_block(p, row, row_end < p.rows ? row_end : p.rows, output,
                   output_end < p.outputs ? output_end : p.outputs);
  }
}

KVKEYE_INSTANTIATE(packed_linear, PackedLinearParams)

} // namespace kvkeye::KVKEYE_ISA
