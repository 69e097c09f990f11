// What forward and backward share: the sum of squares of a tile of rows x components, in registers.
//
//   t_mkd = (z_md - mu_kd) s_kd     s_kd = exp(-logvar_kd / 2)     c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d t^2
//
// A block takes tiles of 128 x 128 (64 x 64 in double precision), of which a thread owns 8 x 8 (4 x 4).  A stage is a
// few dimensions of a tile in shared memory, copied there asynchronously while the one before is worked on: six loads
// of 16 bytes for 128 fused multiply-adds.  docs/cuda-kernels.md has the reasons.
#pragma once

#include <cuda_pipeline.h>

#include "device_math.h"
#include "launch.cuh"
#include "plan.h"

namespace fastvae::cuda {

extern __shared__ unsigned char shared_memory[];

template <class T>
struct alignas(16) Vector {
  T x[Tile<T>::kVector];
};

template <class T, int kDepth>
struct alignas(16) Stage {
  T rows[kDepth][Tile<T>::kSide];
  T pairs[kDepth][2][Tile<T>::kSide];
};

// A thread's place among the 16 x 16 of a block: a warp is 4 x 8 of them, so that its loads are few and without
// conflicts.
struct Place {
  int row, column;
  __device__ Place() {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    row = warp / 2 * 4 + lane / 8;
    column = warp % 2 * 8 + lane % 8;
  }
};

// Which row, or component, of a tile is the i-th of a thread at place `at`: two groups that are one load each.
template <class T>
__device__ __forceinline__ int owned(int at, int i) {
  constexpr int n = Tile<T>::kVector;
  return i / n * (Tile<T>::kSide / 2) + at * n + i % n;
}

template <class T>
__device__ __forceinline__ void load_owned(const T* line, int at, T (&out)[Tile<T>::kOwn]) {
  constexpr int n = Tile<T>::kVector;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector<T> piece = *reinterpret_cast<const Vector<T>*>(line + owned<T>(at, half * n));
#pragma unroll
    for (int i = 0; i < n; ++i) out[half * n + i] = piece.x[i];
  }
}

template <class T>
using Squares = T[Tile<T>::kOwn][Tile<T>::kOwn];  // of a thread's rows x components

// q += t^2 over the dimensions of a stage: the innermost loop.
template <bool kDifference, class T, int kDepth>
__device__ __forceinline__ void add_squares(const Stage<T, kDepth>& stage, int depth, const Place& at, Squares<T>& q) {
  for (int begin = 0; begin < depth; begin += 4) {
#pragma unroll
    for (int d = begin; d < begin + 4; ++d) {
      T z[Tile<T>::kOwn], s[Tile<T>::kOwn], b[Tile<T>::kOwn];
      load_owned(stage.rows[d], at.row, z);
      load_owned(stage.pairs[d][0], at.column, s);
      load_owned(stage.pairs[d][1], at.column, b);
#pragma unroll
      for (int r = 0; r < Tile<T>::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < Tile<T>::kOwn; ++c) {
          const T t = kDifference ? (z[r] - b[c]) * s[c] : T(fma(z[r], s[c], b[c]));
          q[r][c] = T(fma(t, t, q[r][c]));
        }
      }
    }
  }
}

// Where in the stream of stages a block is: which tile, and how many dimensions of it are done.
struct Cursor {
  int64_t row_tile, panel;
  int begin;
};

// Calls finish(row_tile, panel, q) for each of `count` tiles, from the first on by the given steps.
template <int kStages, class T, int kDepth, class Finish>
__device__ __forceinline__ void for_each_tile(Stage<T, kDepth> (&stages)[kStages], const Packed<T>& packed,
                                              Cursor first, int64_t row_step, int64_t panel_step, int64_t count,
                                              const Finish& finish) {
  using Shape = Tile<T>;
  const Place at;
  const auto copy_lines = [](T* to, const T* from, int n) {
    for (int i = int(threadIdx.x) * Shape::kVector; i < n; i += kThreads * Shape::kVector)
      __pipeline_memcpy_async(to + i, from + i, 16);
  };
  const auto depth_of = [&](const Cursor& c) {
    return packed.depth - c.begin < kDepth ? packed.depth - c.begin : kDepth;
  };
  const auto copy = [&](const Cursor& c, Stage<T, kDepth>& stage) {
    const int depth = depth_of(c);
    copy_lines(stage.rows[0], packed.rows + (c.row_tile * packed.depth + c.begin) * Shape::kSide, depth * Shape::kSide);
    copy_lines(stage.pairs[0][0], packed.pairs + (c.panel * packed.depth + c.begin) * 2 * Shape::kSide,
               depth * 2 * Shape::kSide);
  };
  const auto advance = [&](Cursor& c) {
    c.begin += kDepth;
    if (c.begin < packed.depth) return;
    c = {c.row_tile + row_step, c.panel + panel_step, 0};
  };

  const int64_t total = count * ((packed.depth + kDepth - 1) / kDepth);
  Cursor ahead = first, now = first;
  for (int64_t i = 0; i < kStages - 1; ++i) {
    if (i < total) copy(ahead, stages[i]);
    __pipeline_commit();
    advance(ahead);
  }
  Squares<T> q = {};
  int reading = 0;
  for (int64_t i = 0; i < total; ++i) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // the stage is there for all, and nobody reads the one that is overwritten next any more
    if (i + kStages - 1 < total) copy(ahead, stages[reading == 0 ? kStages - 1 : reading - 1]);
    __pipeline_commit();
    advance(ahead);
    if (packed.difference[now.panel] != T(0))
      add_squares<true>(stages[reading], depth_of(now), at, q);
    else
      add_squares<false>(stages[reading], depth_of(now), at, q);
    reading = reading + 1 == kStages ? 0 : reading + 1;
    if (now.begin + kDepth >= packed.depth) {
      finish(now.row_tile, now.panel, q);
#pragma unroll
      for (int r = 0; r < Shape::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < Shape::kOwn; ++c) q[r][c] = T(0);
      }
    }
    advance(now);
  }
}

// q becomes a; -inf where a row leaves a component out.
template <class T>
__device__ __forceinline__ void exponents(const Packed<T>& packed, const Mixture<T>& mix, int64_t row_tile,
                                          int64_t panel, Squares<T>& q) {
  using Shape = Tile<T>;
  const Place at;
  T c[Shape::kOwn];
  load_owned(packed.c + panel * Shape::kSide, at.column, c);
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j) q[r][j] = T(fma(q[r][j], T(-0.5), c[j]));
  }
  if (!mix.exclude) return;
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
    const int64_t m = row_tile * Shape::kSide + owned<T>(at.row, r);
    const int64_t left_out = (m < mix.M ? mix.exclude[m] : -1) - panel * Shape::kSide;
    if (left_out < 0 || left_out >= Shape::kSide) continue;
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j)
      if (owned<T>(at.column, j) == int(left_out)) q[r][j] = T(-INFINITY);
  }
}

}  // namespace fastvae::cuda
