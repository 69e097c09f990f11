// The kernel of backward for large problems.  With w_mk = g_m exp(a_mk - l_m), u = z_md - mu_kd and v = 1 / sigma_kd^2:
//
//   dz_md = -sum_k w u v      dlog w_k = sum_m w
//   dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)
//
// The kernel has two sides.  On the rows' side a block owns a tile of rows and goes through the panels of components,
// for dz.  On the components' side a block owns a panel and goes through the tiles of rows, for the other gradients.
//
// A block goes over each tile twice.  The first pass computes a again, as forward does, and puts the weights w into
// shared memory; a pair that the skipping rule (common/skipping.h) leaves out has w = 0.  The second pass adds up the
// gradients, with the sums in registers.  There a warp has 16 rows (components) of its own, and takes only those items
// of the other side for which at least one of the 16 has a weight.
#pragma once

#include "../common/skipping.h"
#include "tile.cuh"

namespace fastvae::cuda {

enum class Side { rows, components };

// Dimensions of a stage: with 8 of them a block takes 92 KiB of shared memory, which all devices since sm_80 can give.
constexpr int kBackwardDepth = 8;

template <class T>
struct BackwardShared {
  static constexpr int kLine = Tile<T>::kSide + Tile<T>::kVector;  // no two lines begin in the same bank
  Stage<T, kBackwardDepth> stages[2];
  // [item of the other side][own item].  While a tile's squares are added up, the sums of earlier blocks of dimensions.
  T weights[Tile<T>::kSide][kLine];

  __device__ __forceinline__ EarlierInSharedMemory<T> earlier() { return {weights[0]}; }
};
static_assert(sizeof(BackwardShared<float>) <= 99 * 1024 && sizeof(BackwardShared<double>) <= 99 * 1024);

template <class T>
struct BackwardTask {
  Mixture<T> mix;
  Packed<T> packed;
  const T *log_prob, *grad;  // [M]; grad null: all ones
  bool negated, dense;
  T log_negligible;                      // of the skipping rule
  int splits = 1;                        // of the other side
  T* dz = nullptr;                       // [splits, M, D]
  T *dmu = nullptr, *dlogvar = nullptr;  // [splits, K, D]
  T* dweights = nullptr;                 // [splits, K]
};

// The limit of a row's exponents: a pair below the limit is left out.
template <Side kSide, class T>
__device__ T limit_of(const BackwardTask<T>& task, T log_prob, T max_c, T max_log_sigma_ratio) {
  if (task.dense) return T(-INFINITY);
  const T limit = log_prob + task.log_negligible;
  if (kSide == Side::components) return limit;
  return limit - log_t_bound(limit, max_c, max_log_sigma_ratio) - max_log_sigma_ratio;
}

// The squares q become the weights w.  A row that is padding or has density zero counts with l = +inf, so that all its
// weights are 0.
template <Side kSide, class T>
__device__ __forceinline__ void weigh(const BackwardTask<T>& task, int row_tile, int panel, Squares<T>& q) {
  using Shape = Tile<T>;
  const ThreadPosition position;
  exponents(task.packed, task.mix, row_tile, panel, q);
  const T* panel_max = task.packed.panel_max + 2 * int64_t(panel);
  const T max_c = panel_max[0], max_log_sigma_ratio = panel_max[1];
#pragma unroll
  for (int r = 0; r < Shape::kOwn; ++r) {
    const int64_t m = int64_t(row_tile) * Shape::kSide + tile_index<T>(position.row, r);
    const T l = m < task.mix.M ? task.log_prob[m] : T(-INFINITY);
    const bool has_density = l != T(-INFINITY);
    const T log_prob = has_density ? l : T(INFINITY);
    const T grad = !has_density ? T(0) : upstream_gradient(task.grad, task.negated, m);
    const T limit = limit_of<kSide>(task, log_prob, max_c, max_log_sigma_ratio);
#pragma unroll
    for (int c = 0; c < Shape::kOwn; ++c) q[r][c] = q[r][c] < limit ? T(0) : grad * exp_term(q[r][c] - log_prob);
  }
}

template <Side kSide, class T>
__device__ __forceinline__ void store_weights(const Squares<T>& w, BackwardShared<T>& shared) {
  using Shape = Tile<T>;
  const ThreadPosition position;
  const int own = kSide == Side::rows ? position.row : position.column;
  const int other = kSide == Side::rows ? position.column : position.row;
#pragma unroll
  for (int j = 0; j < Shape::kOwn; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int begin = half * Shape::kVector;
      Vector<T> piece;
#pragma unroll
      for (int i = 0; i < Shape::kVector; ++i) piece.x[i] = kSide == Side::rows ? w[begin + i][j] : w[j][begin + i];
      T* to = &shared.weights[tile_index<T>(other, j)][tile_index<T>(own, begin)];
      *reinterpret_cast<Vector<T>*>(to) = piece;
    }
  }
}

// In the second pass a thread adds up for some rows (components) of its own and 8 dimensions; 8 lanes share the rows.
template <class T>
constexpr int kSums = Tile<T>::kSide / (kThreads / 8);  // 4, or 2

template <class T>
__device__ __forceinline__ void load_dimensions(const T* line, T (&out)[8]) {
  constexpr int n = Tile<T>::kVector;
#pragma unroll
  for (int i = 0; i < 8; i += n) {
    const Vector<T> piece = *reinterpret_cast<const Vector<T>*>(line + i);
#pragma unroll
    for (int j = 0; j < n; ++j) out[i + j] = piece.x[j];
  }
}

// What the second pass reads of an item of the other side, a component or a row.
template <Side kSide, class T>
struct Item {
  T mu[8], v[8];
  __device__ __forceinline__ Item(const Packed<T>& packed, int64_t k, int d) {
    load_dimensions(packed.mu + k * packed.width + d, mu);
    load_dimensions(packed.v + k * packed.width + d, v);
  }
};

template <class T>
struct Item<Side::components, T> {
  T z[8];
  __device__ __forceinline__ Item(const Packed<T>& packed, int64_t m, int d) {
    load_dimensions(packed.z + m * packed.width + d, z);
  }
};

// The sums over the other side's items.
template <Side kSide, class T>
struct Sums {
  T wuv[kSums<T>][8];

  __device__ __forceinline__ void add(const T (&w)[kSums<T>], const T (&z)[kSums<T>][8], const Item<kSide, T>& item) {
#pragma unroll
    for (int o = 0; o < kSums<T>; ++o) {
#pragma unroll
      for (int i = 0; i < 8; ++i) wuv[o][i] = T(fma(w[o], (z[o][i] - item.mu[i]) * item.v[i], wuv[o][i]));
    }
  }
};

template <class T>
struct Sums<Side::components, T> {
  T wu[kSums<T>][8], wuu[kSums<T>][8], w_sum[kSums<T>];

  __device__ __forceinline__ void add(const T (&w)[kSums<T>], const T (&mu)[kSums<T>][8],
                                      const Item<Side::components, T>& item) {
#pragma unroll
    for (int o = 0; o < kSums<T>; ++o) {
      w_sum[o] += w[o];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const T u = item.z[i] - mu[o][i], product = w[o] * u;
        wu[o][i] += product;
        wuu[o][i] = T(fma(product, u, wuu[o][i]));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void write(const BackwardTask<T>& task, const Sums<Side::rows, T>& sums, int64_t m, int o,
                                      int d, int64_t split, bool) {
  if (m >= task.mix.M) return;
  T* out = task.dz + (split * task.mix.M + m) * task.mix.D + d;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (d + i < task.mix.D) out[i] = -sums.wuv[o][i];
}

template <class T>
__device__ __forceinline__ void write(const BackwardTask<T>& task, const Sums<Side::components, T>& sums, int64_t k,
                                      int o, int d, int64_t split, bool with_weight) {
  if (k >= task.mix.K) return;
  if (with_weight && task.dweights) task.dweights[split * task.mix.K + k] = sums.w_sum[o];
  T v[8];
  load_dimensions(task.packed.v + k * task.packed.width + d, v);
  const int64_t to = (split * task.mix.K + k) * task.mix.D + d;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (d + i >= task.mix.D) continue;
    if (task.dmu) task.dmu[to + i] = v[i] * sums.wu[o][i];
    if (task.dlogvar) task.dlogvar[to + i] = T(0.5) * T(fma(v[i], sums.wuu[o][i], -sums.w_sum[o]));
  }
}

// Blocks: x is the tile of rows, or the panel, that a block owns; y counts chunks of dimensions within splits.
template <Side kSide, class T>
__global__ void __launch_bounds__(kThreads, 1) backward(BackwardTask<T> task) {
  using Shape = Tile<T>;
  constexpr bool kRows = kSide == Side::rows;
  BackwardShared<T>& shared = *reinterpret_cast<BackwardShared<T>*>(shared_memory);
  const Packed<T>& packed = task.packed;
  const int chunks = int(gridDim.y) / task.splits, chunk = int(blockIdx.y) % chunks;
  const int own_tile = int(blockIdx.x), split = int(blockIdx.y) / chunks;
  const int other_tiles = kRows ? packed.panels : packed.row_tiles;
  const int begin = part_begin(other_tiles, task.splits, split), end = part_begin(other_tiles, task.splits, split + 1);

  // In the second pass: a thread's dimensions, the first of its own items, and the first of its warp's.
  const int lane = int(threadIdx.x) % 32, d = chunk * kChunk + lane % 8 * 8;
  const int first = int(threadIdx.x) / 8 * kSums<T>, first_of_warp = int(threadIdx.x) / 32 * 4 * kSums<T>;
  const bool has_dimensions = d < packed.width;
  Sums<kSide, T> sums = {};

  const auto add = [&](int row_tile, int panel, Squares<T>& q) {
    weigh<kSide>(task, row_tile, panel, q);
    // The weights of the last tile were read before the barrier of this tile's first stage.  The sums of earlier blocks
    // of dimensions, which lie in the same memory, have just been read: they need a barrier here.
    if (packed.depth > kBlock) __syncthreads();
    store_weights<kSide>(q, shared);
    __syncthreads();
    T own[kSums<T>][8];  // z, or mu
#pragma unroll
    for (int o = 0; o < kSums<T>; ++o) {
      const T* line = (kRows ? packed.z : packed.mu) + (int64_t(own_tile) * Shape::kSide + first + o) * packed.width;
      if (has_dimensions) load_dimensions(line + d, own[o]);
    }
    const int64_t first_other = int64_t(kRows ? panel : row_tile) * Shape::kSide;
    for (int base = 0; base < Shape::kSide; base += 32) {
      bool active = false;  // the item base + lane has a weight for one of the warp's own
#pragma unroll
      for (int o = 0; o < 4 * kSums<T>; ++o) active |= shared.weights[base + lane][first_of_warp + o] != T(0);
      unsigned remaining = __ballot_sync(0xFFFFFFFFu, active);
      if (!remaining || !has_dimensions) continue;
      int i = base + __ffs(remaining) - 1;
      for (Item<kSide, T> item(packed, first_other + i, d);;) {
        remaining &= remaining - 1;
        const int next = remaining ? base + __ffs(remaining) - 1 : i;
        const Item<kSide, T> next_item(packed, first_other + next, d);  // on its way while this one is worked on
        T w[kSums<T>];
#pragma unroll
        for (int o = 0; o < kSums<T>; ++o) w[o] = shared.weights[i][first + o];
        sums.add(w, own, item);
        if (!remaining) break;
        item = next_item;
        i = next;
      }
    }
  };
  const Cursor start = kRows ? Cursor{own_tile, begin, 0} : Cursor{begin, own_tile, 0};
  for_each_tile(shared.stages, shared.earlier(), packed, start, kRows ? 0 : 1, kRows ? 1 : 0, end - begin, add);

  if (!has_dimensions) return;
#pragma unroll
  for (int o = 0; o < kSums<T>; ++o)
    write(task, sums, int64_t(own_tile) * Shape::kSide + first + o, o, d, split, chunk == 0 && lane % 8 == 0);
}

}  // namespace fastvae::cuda
