// The kernel of backward for large problems.  With w_mk = g_m exp(a_mk - l_m), u = z_md - mu_kd and v = 1 / sigma_kd^2:
//
//   dz_md = -sum_k w u v      dlog w_k = sum_m w
//   dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)
//
// The kernel has two sides.  On the rows' side a block owns a tile of rows and goes through the components, for dz.  On
// the components' side a block owns the components of a tile and goes through the rows, for the other gradients.
//
// A block goes over each tile twice.  The first pass computes a again, as forward does, and puts the weights w into
// shared memory; a pair that the skipping rule (common/skipping.h) leaves out has w = 0.  The second pass adds up the
// gradients, with the sums in registers (backward_sums.cuh).
#pragma once

#include "../common/skipping.h"
#include "backward_sums.cuh"

namespace fastvae::cuda {

// A thread's position in the first pass.  A warp is 8 x 4 of the threads, with 8 on its own side.  The position on the
// own side is in the middle bits of the lane's number.  So the lanes 2 i and 2 i + 1, or i and i + 2, read the same
// address whatever they read, and loads of 16 bytes take half as many passes; and a quarter of a warp stores its
// weights to different banks.
template <Side kSide>
__device__ __forceinline__ ThreadPosition backward_position() {
  const unsigned thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int own = int(warp % 2 * 8 + lane / 2 % 8), other = int(warp / 2 * 4 + lane % 2 + lane / 16 * 2);
  return kSide == Side::rows ? ThreadPosition(own, other) : ThreadPosition(other, own);
}

// The limit of a row's exponents: a pair below the limit is left out.
template <Side kSide, class T>
__device__ T limit_of(const BackwardTask<T>& task, T log_prob, T max_c, T max_log_sigma_ratio) {
  if (task.dense) return T(-INFINITY);
  const T limit = log_prob + task.log_negligible;
  if (kSide == Side::components) return limit;
  return limit - log_t_bound(limit, max_c, max_log_sigma_ratio) - max_log_sigma_ratio;
}

// Puts into shared memory what turns a tile's squares into weights.  A row that is padding or has density zero counts
// with l = +inf, so that all its weights are 0.
template <Side kSide, class T>
__device__ __forceinline__ void begin_tile(const BackwardTask<T>& task, int row_tile, int component_tile,
                                           BackwardShared<kSide, T>& shared) {
  using Shape = BackwardTile<kSide, T>;
  const int i = int(thread_index());
  if (i < Shape::kRows) {
    const int64_t m = int64_t(row_tile) * Shape::kRows + i;
    const T l = m < task.mix.M ? task.log_prob[m] : T(-INFINITY);
    const bool has_density = l != T(-INFINITY);
    const T log_prob = has_density ? l : T(INFINITY);
    const T* panel_max = task.packed.panel_max + 2 * int64_t(component_tile / 2);
    shared.log_prob[i] = log_prob;
    shared.grad[i] = !has_density ? T(0) : upstream_gradient(task.grad, task.negated, m);
    shared.limit[i] = limit_of<kSide>(task, log_prob, panel_max[0], panel_max[1]);
    const int64_t excluded = task.mix.exclude && m < task.mix.M ? task.mix.exclude[m] : -1;
    const int64_t in_tile = excluded - int64_t(component_tile) * Shape::kComponents;
    shared.excluded[i] = excluded >= 0 && in_tile >= 0 && in_tile < Shape::kComponents ? int(in_tile) : -1;
  } else if (i < Shape::kRows + Shape::kComponents) {
    const int own = i - Shape::kRows;
    shared.c[own] = task.packed.c[int64_t(component_tile) * Shape::kComponents + own];
    if (own == 0) shared.difference_form = task.packed.difference_form[component_tile / 2] != T(0);
  }
}

// The squares q of a tile become the weights w, in shared memory.
template <Side kSide, class T, int n>
__device__ __forceinline__ void weigh(const T (&q)[Tile<T>::kOwn][n], BackwardShared<kSide, T>& shared) {
  constexpr bool kOwnsRows = kSide == Side::rows;
  const ThreadPosition position = backward_position<kSide>();
  const int column = tile_index<T>(position.column, 0);
  T c[n];
  load_together(shared.c + column, c);
#pragma unroll
  for (int begin = 0; begin < Tile<T>::kOwn; begin += n) {
    const int row = tile_index<T>(position.row, begin);
    T log_prob[n], grad[n], limit[n];
    load_together(shared.log_prob + row, log_prob);
    load_together(shared.grad + row, grad);
    load_together(shared.limit + row, limit);
#pragma unroll
    for (int other = 0; other < n; ++other) {
      Vector<T> w;
#pragma unroll
      for (int own = 0; own < n; ++own) {
        const int i = kOwnsRows ? own : other, j = kOwnsRows ? other : own;
        const T a = T(fma(q[begin + i][j], T(-0.5), c[j]));
        w.x[own] = a < limit[i] ? T(0) : grad[i] * exp_term(a - log_prob[i]);
      }
      T* to = kOwnsRows ? &shared.weights[column + other][row] : &shared.weights[row + other][column];
      *reinterpret_cast<Vector<T>*>(to) = w;
    }
  }
}

// The weight of the component that a row excludes is 0.
template <Side kSide, class T>
__device__ __forceinline__ void exclude(BackwardShared<kSide, T>& shared) {
  using Shape = BackwardTile<kSide, T>;
  __syncthreads();  // all weights have been written
  const int row = int(thread_index()), excluded = row < Shape::kRows ? shared.excluded[row] : -1;
  if (excluded >= 0) (Shape::kOwnsRows ? shared.weights[excluded][row] : shared.weights[row][excluded]) = T(0);
}

// Blocks: x is the tile of rows, or of components, that a block owns; y counts chunks of dimensions within splits.
template <Side kSide, class T, int kDimensions>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1) backward(BackwardTask<T> task) {
  using Shape = BackwardTile<kSide, T>;
  constexpr bool kOwnsRows = Shape::kOwnsRows;
  BackwardShared<kSide, T>& shared = *reinterpret_cast<BackwardShared<kSide, T>*>(shared_memory);
  const Packed<T>& packed = task.packed;
  if (is_off(packed.only_if)) return;
  if (task.only_tiles && task.only_tiles[blockIdx.x] == 0) return;
  const int own_tile = int(blockIdx.x), first_dimension = int(blockIdx.y) % task.chunks * kChunk;
  const int other_tiles = kOwnsRows ? component_tiles(task.mix) : packed.row_tiles;
  const int split = int(blockIdx.y) / task.chunks;
  const int begin = part_begin(other_tiles, task.splits, split), end = part_begin(other_tiles, task.splits, split + 1);

  const ThreadPosition position = backward_position<kSide>();
  Sums<kSide, T, kDimensions> sums;
  shared.w_sum[threadIdx.x] = T(0);
  BackwardStream<kSide, T> stream(shared.stages, packed, own_tile, begin, end, first_dimension);
  while (stream.tile() < end) {
    const int row_tile = kOwnsRows ? own_tile : stream.tile(), component_tile = kOwnsRows ? stream.tile() : own_tile;
    begin_tile(task, row_tile, component_tile, shared);  // the first stage's barrier is also that of this
    Squares<T, Shape::kColumns> q = {};
    for (int d = 0; d < packed.depth; d += kBackwardDepth) {
      const auto& stage = stream.next().squares;
      const int done = d + kBackwardDepth, depth = done <= packed.depth ? kBackwardDepth : packed.depth - d;
      if (shared.difference_form)
        add_squares<true, 2>(stage, depth, position, q);
      else
        add_squares<false, 2>(stage, depth, position, q);
      const bool last = done >= packed.depth;
      if (last || done % kBlock == 0) {
        auto earlier = shared.earlier();
        end_block(q, earlier, done <= kBlock, last);
      }
    }
    // The weights of the last tile were read before the barrier of this tile's first stage.  The sums of earlier blocks
    // of dimensions, which lie in the same memory, have just been read: they need a barrier here.
    if (packed.depth > kBlock) __syncthreads();
    weigh(q, shared);
    if (task.mix.exclude) exclude(shared);
    sums.load_own(packed, own_tile, first_dimension);
    for (int piece = 0; piece < Shape::kPieces; ++piece) {
      const auto& stage = stream.next().items;  // the first barrier is also that of the weights
      if (piece == 0) sums.add_weights(shared);
      sums.add(stage, &shared.weights[piece * Shape::kItems]);
    }
  }
  sums.write(task, own_tile, int(block_index_y()) / task.chunks, first_dimension, shared);
}

}  // namespace fastvae::cuda
