// Lines of features in shared memory, and products of them on tensor cores (product.h).
#pragma once

#include <cuda_pipeline.h>

#include "product.h"
#include "tensor_cores.cuh"
#include "tile.cuh"

namespace fastvae::cuda {

// Of a tile of lines in shared memory, where a unit of an item's line lies.  The units of eight neighbouring items lie
// in different banks.
__device__ __forceinline__ int unit_at(int item, int unit) { return item * 8 + (unit ^ (item & 7)); }

// Begins to copy one of the `lines` of each of kItems items to shared memory.
template <int kItems>
__device__ __forceinline__ void copy_lines(uint4* to, const uint4* from, int64_t first, int lines, int line) {
  constexpr int kAtOnce = kThreads / 8;  // items
  const int thread = int(thread_index()), item = thread / 8, unit = thread % 8;
  from += ((first + item) * lines + line) * 8 + unit;
  to += unit_at(item, unit);
#pragma unroll
  for (int step = 0; step < kItems / kAtOnce; ++step) {
    __pipeline_memcpy_async(to + step * kAtOnce * 8, from, sizeof(uint4));
    from += kAtOnce * 8 * lines;
  }
}

// The part of a lane in the operand of kStep features of 16 items from `first` on, which are rows of the product, or
// columns (two times 8: the registers 0, 1 and 2, 3).  The features begin at `unit`, which is even, as `first` is a
// multiple of 8: so the address is a sum of what depends on the lane and an "exclusive or" with a constant.
__device__ __forceinline__ void load_as_rows(uint32_t (&out)[4], const uint4* tile, int first, int unit) {
  const int lane = int(threadIdx.x) % 32;
  load_matrices(out, tile + (first + lane % 16) * 8 + (unit ^ (lane / 16) ^ (lane % 8)));
}
__device__ __forceinline__ void load_as_columns(uint32_t (&out)[4], const uint4* tile, int first, int unit) {
  const int lane = int(threadIdx.x) % 32;
  load_matrices(out, tile + (first + lane / 16 * 8 + lane % 8) * 8 + (unit ^ (lane / 8 % 2) ^ (lane % 8)));
}

// Adds to `sum` the product of two operands in kParts parts, without lo lo.  Tensor cores do not round their sums but
// cut digits off: a sum of many products would end below the right one.  So in "high" the products of kStep features
// are summed from 0, the small ones first, and the result is added by an addition that rounds.  Of the small ones those
// with the components' low part come first, whichever operand the rows are, so that the sums have the same bits.
template <int kParts, bool kRowsAreFirst>
__device__ __forceinline__ void add_product(float (&sum)[4], const uint32_t (&a)[kParts][4],
                                            const uint32_t (&b)[kParts][4], int column) {
  if constexpr (kParts == 1) {
    multiply_add(sum, a[0], b[0][2 * column], b[0][2 * column + 1]);
  } else {
    float part[4] = {};
    constexpr int kLow = kRowsAreFirst ? 1 : 0;  // which part of b comes first
    multiply_add(part, a[1 - kLow], b[kLow][2 * column], b[kLow][2 * column + 1]);
    multiply_add(part, a[kLow], b[1 - kLow][2 * column], b[1 - kLow][2 * column + 1]);
    multiply_add(part, a[0], b[0][2 * column], b[0][2 * column + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += part[i];
  }
}

// Of the four lanes that share a row of sums.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// How many bits are set, in all lanes of the warp.
__device__ __forceinline__ int warp_count(unsigned bits) {
  int count = __popc(bits);
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(0xFFFFFFFFu, count, step);
  return count;
}

// The sum of 2^x over all x that were added, as total * 2^max.
struct BinaryLogSum {
  float max = Limits<float>::kLowest, total = 0;

  __device__ __forceinline__ void merge(const BinaryLogSum& other) {
    const float higher = fmaxf(max, other.max);
    total = total * exp2_term(max - higher) + other.total * exp2_term(other.max - higher);
    max = higher;
  }
  // The natural logarithm of the sum plus `term`; -inf where nothing was added.
  __device__ __forceinline__ float log(float term) const {
    return float((double(max) + log2(double(total))) * (1.0 / kLog2E) + double(term));
  }
};

}  // namespace fastvae::cuda
