// Every PTX instruction that the kernels use, as a function with a name. The host compiler finds the same
// functions in csrc/host_cuda/ptx_host.h.
//
// Fragments of a matrix product lie across the lanes of a warp. With g = lane / 4 and c = 2 (lane % 4):
//   a[4]  16 x 16: rows g, g + 8, g, g + 8; columns c and c + 1, for the last two c + 8 and c + 9
//   b[2]  16 x  8: column g; rows c and c + 1, then c + 8 and c + 9
//   d[4]  16 x  8: row g columns c and c + 1, then row g + 8
// Two 16-bit values share a word, the first in the lower half.
#pragma once

#include "device.h"

#ifdef __CUDACC__

namespace kvkeye::cuda {

// Copies 16 bytes from global to shared memory, or writes 16 zeros there. The copy is this thread's to see
// once a wait has covered its group, and the others' after a barrier behind that wait.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t target = (uint32_t)__cvta_generic_to_shared(shared);
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most GroupsLeft of the committed groups are on their way.
template <int GroupsLeft> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit values from shared memory; lane i brings the address of row i % 8 of matrix
// i / 8. Lane i receives columns c and c + 1 of row g of each.
__device__ __forceinline__ void load_matrices(uint32_t (&found)[4], const void* row) {
  const uint32_t source = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(source)
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&found)[4], const void* row) {
  const uint32_t source = (uint32_t)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(source)
               : "memory");
}

// d += a b on the tensor cores: bf16 in, fp32 sums.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, relative error 2^-22; 2^0 is 1 and 2^-inf is 0, exactly.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two products of bf16, to nearest even; subnormal numbers count.
__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u)); // + -0
  return product;
}

// Two values rounded to bf16, to nearest even.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

} // namespace kvkeye::cuda

#else

#include "ptx_host.h"

#endif
