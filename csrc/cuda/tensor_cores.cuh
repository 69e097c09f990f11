// The instructions of the tensor cores, which all devices since sm_80 have: matrices of fp16 numbers, sums in fp32.
//
// A warp multiplies a [16, 16] by b [16, 8] and adds the product to a sum [16, 8].  Each lane holds a part of each
// matrix, two fp16 numbers to a register.  With group = lane / 4 and pair = lane % 4 * 2, and i, j = 0, 1:
//
//   a[2 j + i]    a[group + 8 i][pair + 8 j, pair + 8 j + 1]
//   b[j]          b[pair + 8 j, pair + 8 j + 1][group]
//   sum[2 i + j]  sum[group + 8 i][pair + j]
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#ifndef __CUDACC__
#include <emulated_tensor_cores.h>  // of the tests, which run the kernels on the CPU
#endif

namespace fastvae::cuda {

#ifdef __CUDACC__

// Loads four matrices of 8 x 8 from shared memory.  Lane 8 i + r says where row r of matrix i begins: 16 bytes, on a
// boundary of 16.  out[i] then holds elements [lane / 4][lane % 4 * 2, + 1] of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same with each matrix transposed: out[i] holds elements [lane % 4 * 2, + 1][lane / 4] of matrix i.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// sum += a b.
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace fastvae::cuda
