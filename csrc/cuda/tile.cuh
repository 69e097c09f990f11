// What forward and backward share: the sum of squares of a tile of rows x components, in registers.
//
//   t_mkd = (z_md - mu_kd) s_kd     s_kd = exp(-logvar_kd / 2)     c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d t^2
//
// A block takes tiles of 128 x 128 (64 x 64 in double precision), of which a thread owns 8 x 8 (4 x 4).  A stage is a
// few dimensions of a tile in shared memory, copied there asynchronously while the one before is worked on: six loads
// of 16 bytes for 128 fused multiply-adds.  docs/developers/cuda-kernels.md has the reasons.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "device_math.h"
#include "launch.cuh"
#include "plan.h"
#include "row.cuh"

namespace fastvae::cuda {

alignas(16) extern __shared__ unsigned char shared_memory[];

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

// The i for which that is `index`, or -1.
template <class T>
__device__ __forceinline__ int which_owned(int at, int index) {
  constexpr int n = Tile<T>::kVector, half = Tile<T>::kSide / 2;
  const int i = index % half - at * n;
  return i < 0 || i >= n ? -1 : index / half * n + i;
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
  for (int begin = 0; begin < depth; begin += 2) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int d = begin + j;
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

// What arrives at log p of row m.
template <class T>
__device__ __forceinline__ T gradient_at(const T* grad, bool negated, int64_t m) {
  const T given = grad ? grad[m] : T(1);
  return negated ? -given : given;
}

// Where the i-th of `parts` parts of n begins; they differ in length by one at most.
__device__ __forceinline__ int cut(int n, int parts, int i) {
  const int more = n % parts;
  return n / parts * i + (i < more ? i : more);
}

// Where in the stream of stages a block is: which tile, and how many dimensions of it are done.
struct Cursor {
  int row_tile, panel, begin;
};

// Begins to copy `lines` lines of kSide numbers, kMaxLines at most.
template <int kMaxLines, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from, int lines) {
  constexpr int n = Tile<T>::kVector, steps = kMaxLines * Tile<T>::kSide / (kThreads * n);
  static_assert(steps * kThreads * n == kMaxLines * Tile<T>::kSide, "every thread copies as much");
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    const int i = (step * kThreads + int(threadIdx.x)) * n;
    if (i < lines * Tile<T>::kSide) __pipeline_memcpy_async(to + i, from + i, 16);
  }
}

// Where a thread keeps, for each q, the sum of the blocks of dimensions before the one that it adds up.
struct NoEarlierBlocks {};  // D is kBlock at most

template <class T>
struct EarlierInRegisters {
  Squares<T> sums;
  __device__ __forceinline__ T& operator()(int r, int c) { return sums[r][c]; }
};

template <class T>
struct EarlierInSharedMemory {
  T* sums;  // [kOwn, kOwn, kThreads]
  __device__ __forceinline__ T& operator()(int r, int c) {
    return sums[(r * Tile<T>::kOwn + c) * kThreads + int(threadIdx.x)];
  }
};

// q is a block's sum: it goes to those of the earlier blocks, or at the end these come to it.
template <class T, class Earlier>
__device__ __forceinline__ void end_block(Squares<T>& q, Earlier& earlier, bool first, bool last) {
  if constexpr (!std::is_same_v<Earlier, NoEarlierBlocks>) {
    if (first && last) return;
#pragma unroll
    for (int r = 0; r < Tile<T>::kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < Tile<T>::kOwn; ++c) {
        if (!first) q[r][c] += earlier(r, c);
        if (last) continue;
        earlier(r, c) = q[r][c];
        q[r][c] = T(0);
      }
    }
  }
}

// Calls finish(row_tile, panel, q) for each of `count` tiles, from the first on by the given steps.  While one of the two
// stages is worked on, the next few dimensions are copied to the other.
template <class T, int kDepth, class Earlier, class Finish>
__device__ __forceinline__ void for_each_tile(Stage<T, kDepth> (&stages)[2], Earlier earlier, const Packed<T>& packed,
                                              Cursor now, int row_step, int panel_step, int count,
                                              const Finish& finish) {
  using Shape = Tile<T>;
  static_assert(kBlock % kDepth == 0);
  const Place at;
  const auto depth_of = [&](const Cursor& c) {
    return packed.depth - c.begin < kDepth ? packed.depth - c.begin : kDepth;
  };
  const auto copy = [&](const Cursor& c, Stage<T, kDepth>& stage) {
    const int depth = depth_of(c);
    const int64_t row_line = int64_t(c.row_tile) * packed.depth + c.begin;
    const int64_t pair_line = int64_t(c.panel) * packed.depth + c.begin;
    copy_async<kDepth>(stage.rows[0], packed.rows + row_line * Shape::kSide, depth);
    copy_async<2 * kDepth>(stage.pairs[0][0], packed.pairs + pair_line * 2 * Shape::kSide, 2 * depth);
    __pipeline_commit();
  };
  const auto after = [&](const Cursor& c) {
    return c.begin + kDepth < packed.depth ? Cursor{c.row_tile, c.panel, c.begin + kDepth}
                                           : Cursor{c.row_tile + row_step, c.panel + panel_step, 0};
  };

  if (count > 0) copy(now, stages[0]);
  Squares<T> q = {};
  int reading = 0;
  for (int left = count * ((packed.depth + kDepth - 1) / kDepth); left > 0; --left) {
    __pipeline_wait_prior(0);
    __syncthreads();  // the stage is there for all, and nobody reads the other one any more
    if (left > 1) copy(after(now), stages[1 - reading]);
    if (packed.difference[now.panel] != T(0))
      add_squares<true>(stages[reading], depth_of(now), at, q);
    else
      add_squares<false>(stages[reading], depth_of(now), at, q);
    reading = 1 - reading;
    const int done = now.begin + kDepth;
    const bool last = done >= packed.depth;
    if (last || done % kBlock == 0) end_block(q, earlier, done <= kBlock, last);
    if (last) {
      finish(now.row_tile, now.panel, q);
#pragma unroll
      for (int r = 0; r < Shape::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < Shape::kOwn; ++c) q[r][c] = T(0);
      }
    }
    now = after(now);
  }
}

// q becomes a; -inf where a row leaves a component out.
template <class T>
__device__ __forceinline__ void exponents(const Packed<T>& packed, const Mixture<T>& mix, int row_tile, int panel,
                                          Squares<T>& q) {
  using Shape = Tile<T>;
  const Place at;
  T c[Shape::kOwn];
  load_owned(packed.c + int64_t(panel) * Shape::kSide, at.column, c);
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j) q[r][j] = T(fma(q[r][j], T(-0.5), c[j]));
  }
  if (!mix.exclude) return;
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
    const int64_t m = int64_t(row_tile) * Shape::kSide + owned<T>(at.row, r);
    if (m >= mix.M) continue;
    const int64_t component = mix.exclude[m];
    if (component < 0 || component / Shape::kSide != panel) continue;
    const int left_out = which_owned<T>(at.column, int(component % Shape::kSide));
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j)
      if (j == left_out) q[r][j] = T(-INFINITY);
  }
}

}  // namespace fastvae::cuda
