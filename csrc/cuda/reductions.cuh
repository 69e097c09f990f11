// Reductions over the first dimension of an array: the sum of a gradient's splits, and the sum or the largest of each
// column of a matrix.  One thread makes one number, so the order of a sum is always the same.
#pragma once

#include "launch.cuh"
#include "plan.h"

namespace fastvae::cuda {

// out[i] = splits[0][i] + splits[1][i] + ..., in that order; splits [count, n].
template <class T>
__global__ void __launch_bounds__(kThreads) sum_splits(const T* splits, int64_t count, int64_t n, T* out) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  T sum = 0;
  for (int64_t split = 0; split < count; ++split) sum += splits[split * n + i];
  out[i] = sum;
}

constexpr int64_t kRowsOfAThread = 512;

// out[b][d] is the sum of column d, or its largest number, over the b-th kRowsOfAThread rows of x [rows, D].  Rows
// whose weight is -inf do not count; log_weights [rows], or null.  only_if: see Packed, or null.
template <bool kSum, class T>
__global__ void __launch_bounds__(kThreads)
    reduce_columns(const T* x, const T* log_weights, int64_t rows, int64_t D, const int* only_if, T* out) {
  if (is_off(only_if)) return;
  const int64_t d = int64_t(blockIdx.y) * kThreads + threadIdx.x, begin = int64_t(blockIdx.x) * kRowsOfAThread;
  if (d >= D) return;
  T result = kSum ? T(0) : T(-INFINITY);
  for (int64_t k = begin; k < rows && k < begin + kRowsOfAThread; ++k) {
    if (log_weights && log_weights[k] == T(-INFINITY)) continue;
    result = kSum ? result + x[k * D + d] : T(fmax(result, x[k * D + d]));
  }
  out[blockIdx.x * D + d] = result;
}

// How many numbers of scratch memory the next functions need.
inline int64_t columns_scratch(int64_t rows, int64_t D) { return 2 * blocks_for(rows, kRowsOfAThread) * D; }

template <bool kSum, class T>
void reduce_to_one_row(const T* x, const T* log_weights, int64_t rows, int64_t D, const int* only_if, T* scratch,
                       T* out, Stream stream) {
  while (rows > 0) {
    const int64_t blocks = blocks_for(rows, kRowsOfAThread);
    T* to = blocks == 1 ? out : scratch;
    launch(stream, blocks, blocks_for(D, kThreads), kThreads, 0, reduce_columns<kSum, T>, x, log_weights, rows, D,
           only_if, to);
    if (blocks == 1) return;
    x = to, log_weights = nullptr, rows = blocks, scratch += blocks * D;
  }
}

// out[d] is the sum of column d of x [rows, D].
template <class T>
void sum_columns(const T* x, int64_t rows, int64_t D, T* scratch, T* out, Stream stream) {
  reduce_to_one_row<true, T>(x, nullptr, rows, D, nullptr, scratch, out, stream);
}

// out[d] is the largest number of column d of x [rows, D], of the rows whose weight is not -inf.
template <class T>
void max_columns(const T* x, const T* log_weights, int64_t rows, int64_t D, const int* only_if, T* scratch, T* out,
                 Stream stream) {
  reduce_to_one_row<false, T>(x, log_weights, rows, D, only_if, scratch, out, stream);
}

}  // namespace fastvae::cuda
