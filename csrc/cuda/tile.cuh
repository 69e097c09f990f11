// What forward and backward of large problems share: the exponents a of a tile of rows x components, in registers.
//
//   t_mkd = (z_md - mu_kd) s_kd     s_kd = exp(-logvar_kd / 2)     c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d t^2
//
// In forward a block takes tiles of 128 x 128 (64 x 64 in double precision), of which a thread owns 8 x 8 (4 x 4).  In
// backward both have half as many components.  A stage is a few dimensions of a tile in shared memory.  It is copied
// there asynchronously, while the stage before it is worked on.  For one dimension a thread of forward makes six loads
// of 16 bytes and 128 multiply-adds.  docs/developers/cuda-kernels.md has the reasons.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "device_math.h"
#include "launch.cuh"
#include "plan.h"
#include "row.cuh"

namespace fastvae::cuda {

alignas(16) extern __shared__ unsigned char shared_memory[];

// threadIdx.x and blockIdx.y, of which the compiler does not know that they are always the same.  Else it would compute
// what depends on them before the loop over the tiles and keep it, where the registers are needed for sums.
__device__ __forceinline__ unsigned thread_index() {
  unsigned index = threadIdx.x;
#ifdef __CUDA_ARCH__
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
#endif
  return index;
}
__device__ __forceinline__ unsigned block_index_y() {
  unsigned index = blockIdx.y;
#ifdef __CUDA_ARCH__
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
#endif
  return index;
}

template <class T, int kDepth, int kComponents = Tile<T>::kSide>
struct alignas(16) Stage {
  T rows[kDepth][Tile<T>::kSide];
  T components[kDepth][2][kComponents];
};

// A thread's position among the 16 x 16 threads of a block.  In forward a warp is 4 x 8 of them, so that its loads from
// shared memory are few and without bank conflicts.
struct ThreadPosition {
  int row, column;
  __device__ ThreadPosition(int row, int column) : row(row), column(column) {}
  __device__ ThreadPosition() {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    row = warp / 2 * 4 + lane / 8;
    column = warp % 2 * 8 + lane % 8;
  }
};

// A thread owns two groups of a tile's rows, and one or two of its components, each as wide as one load.  This is the
// index in the tile of the i-th that a thread at `position` owns.
template <class T>
__device__ __forceinline__ int tile_index(int position, int i) {
  constexpr int n = Tile<T>::kVector;
  return i / n * (Tile<T>::kSide / 2) + position * n + i % n;
}

// The i for which tile_index is `index`, or -1.
template <class T>
__device__ __forceinline__ int own_index(int position, int index) {
  constexpr int n = Tile<T>::kVector, half = Tile<T>::kSide / 2;
  const int i = index % half - position * n;
  return i < 0 || i >= n ? -1 : index / half * n + i;
}

template <class T, int kCount>
__device__ __forceinline__ void load_own(const T* line, int position, T (&out)[kCount]) {
  constexpr int n = Tile<T>::kVector;
#pragma unroll
  for (int begin = 0; begin < kCount; begin += n) {
    const Vector<T> piece = *reinterpret_cast<const Vector<T>*>(line + tile_index<T>(position, begin));
#pragma unroll
    for (int i = 0; i < n; ++i) out[begin + i] = piece.x[i];
  }
}

template <class T, int kColumns = Tile<T>::kOwn>
using Squares = T[Tile<T>::kOwn][kColumns];  // of the rows x components that a thread owns

// q += t^2 over the dimensions of a stage: the innermost loop, of which kUnroll turns are one.
template <bool kDifference, int kUnroll = 1, class T, int kDepth, int kComponents, int kColumns>
__device__ __forceinline__ void add_squares(const Stage<T, kDepth, kComponents>& stage, int depth,
                                            const ThreadPosition& position, Squares<T, kColumns>& q) {
  static_assert(kComponents == 16 * kColumns);
#pragma unroll(kUnroll)
  for (int begin = 0; begin < depth; begin += 2) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int d = begin + j;
      T z[Tile<T>::kOwn], s[kColumns], b[kColumns];
      load_own(stage.rows[d], position.row, z);
      load_own(stage.components[d][0], position.column, s);
      load_own(stage.components[d][1], position.column, b);
#pragma unroll
      for (int r = 0; r < Tile<T>::kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const T t = kDifference ? (z[r] - b[c]) * s[c] : T(fma(z[r], s[c], b[c]));
          q[r][c] = T(fma(t, t, q[r][c]));
        }
      }
    }
  }
}

// A component of weight -inf is absent.
template <class T>
__device__ __forceinline__ bool is_present(const Mixture<T>& mix, int64_t k) {
  return k < mix.K && !(mix.log_weights && mix.log_weights[k] == T(-INFINITY));
}

// The upstream gradient of row m's log p; without `grad` it is 1.
template <class T>
__device__ __forceinline__ T upstream_gradient(const T* grad, bool negated, int64_t m) {
  const T upstream = grad ? grad[m] : T(1);
  return negated ? -upstream : upstream;
}

// Where the i-th part begins when n tiles are split in `parts`, whose lengths differ by at most one.
__device__ __forceinline__ int part_begin(int n, int parts, int i) {
  const int longer = n % parts;  // the first ones
  return n / parts * i + (i < longer ? i : longer);
}

// A stage: of which tile, and its first dimension.
struct Cursor {
  int row_tile, panel, d;
};

// Begins to copy `lines` lines of kSide numbers, at most kMaxLines.
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

// Where a thread keeps, for each of its squares, the sum over the earlier blocks of dimensions (kBlock in plan.h).
struct NoEarlierBlocks {};  // D is at most kBlock

template <class T>
struct EarlierInRegisters {
  Squares<T> sums;
  __device__ __forceinline__ T& operator()(int r, int c) { return sums[r][c]; }
};

template <class T, int kColumns>
struct EarlierInSharedMemory {
  T* sums;  // the thread's, of [kOwn, kColumns, kThreads]
  __device__ __forceinline__ T& operator()(int r, int c) { return sums[(r * kColumns + c) * kThreads]; }
};

// At the end of a block of dimensions its sum q is added to that of the earlier blocks; at the end of the last one,
// these are added to q.
template <class Earlier, class T, int kColumns>
__device__ __forceinline__ void end_block(T (&q)[Tile<T>::kOwn][kColumns], Earlier& earlier, bool first, bool last) {
  if constexpr (!std::is_same_v<Earlier, NoEarlierBlocks>) {
    if (first && last) return;
#pragma unroll
    for (int r = 0; r < Tile<T>::kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (!first) q[r][c] += earlier(r, c);
        if (last) continue;
        earlier(r, c) = q[r][c];
        q[r][c] = T(0);
      }
    }
  }
}

// Calls finish(row_tile, panel, q) for each of `count` tiles, the first at `now`, each next one by the given steps
// further.  While one of the two stages is worked on, the next few dimensions are copied to the other one.
template <class T, int kDepth, class Earlier, class Finish>
__device__ __forceinline__ void for_each_tile(Stage<T, kDepth> (&stages)[2], Earlier earlier, const Packed<T>& packed,
                                              Cursor now, int row_step, int panel_step, int count,
                                              const Finish& finish) {
  using Shape = Tile<T>;
  static_assert(kBlock % kDepth == 0);
  const ThreadPosition position;
  const auto depth_of = [&](const Cursor& c) { return packed.depth - c.d < kDepth ? packed.depth - c.d : kDepth; };
  const auto copy = [&](const Cursor& c, Stage<T, kDepth>& stage) {
    const int depth = depth_of(c);
    const int64_t row_line = int64_t(c.row_tile) * packed.depth + c.d;
    const int64_t component_line = int64_t(c.panel) * packed.depth + c.d;
    copy_async<kDepth>(stage.rows[0], packed.rows + row_line * Shape::kSide, depth);
    copy_async<2 * kDepth>(stage.components[0][0], packed.components + component_line * 2 * Shape::kSide, 2 * depth);
    __pipeline_commit();
  };
  const auto next = [&](const Cursor& c) {
    return c.d + kDepth < packed.depth ? Cursor{c.row_tile, c.panel, c.d + kDepth}
                                       : Cursor{c.row_tile + row_step, c.panel + panel_step, 0};
  };

  if (count > 0) copy(now, stages[0]);
  Squares<T> q = {};
  int reading = 0;
  for (int remaining = count * ((packed.depth + kDepth - 1) / kDepth); remaining > 0; --remaining) {
    __pipeline_wait_prior(0);
    __syncthreads();  // every thread's copies have arrived, and no thread reads the other stage any more
    if (remaining > 1) copy(next(now), stages[1 - reading]);
    if (packed.difference_form[now.panel] != T(0))
      add_squares<true>(stages[reading], depth_of(now), position, q);
    else
      add_squares<false>(stages[reading], depth_of(now), position, q);
    reading = 1 - reading;
    const int done = now.d + kDepth;
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
    now = next(now);
  }
}

// The squares q become the exponents a; -inf for the component that a row excludes.
template <class T>
__device__ __forceinline__ void exponents(const Packed<T>& packed, const Mixture<T>& mix, int row_tile, int panel,
                                          Squares<T>& q) {
  using Shape = Tile<T>;
  const ThreadPosition position;
  T c[Shape::kOwn];
  load_own(packed.c + int64_t(panel) * Shape::kSide, position.column, c);
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j) q[r][j] = T(fma(q[r][j], T(-0.5), c[j]));
  }
  if (!mix.exclude) return;
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
    const int64_t m = int64_t(row_tile) * Shape::kSide + tile_index<T>(position.row, r);
    if (m >= mix.M) continue;
    const int64_t component = mix.exclude[m];
    if (component < 0 || component / Shape::kSide != panel) continue;
    const int excluded = own_index<T>(position.column, int(component % Shape::kSide));
#pragma unroll
    for (int j = 0; j < Shape::kOwn; ++j)
      if (j == excluded) q[r][j] = T(-INFINITY);
  }
}

}  // namespace fastvae::cuda
