// The second pass of backward for large problems: the sums over the other side's items, in registers.
//
// A thread has 8 rows (4 components) of its own, 4 and 2 in double precision, and kDimensions dimensions; 16 lanes
// share the rows.  So a warp has 16 rows (8 components) of its own, and takes only those items of the other side for
// which one of them has a weight.
#pragma once

#include "backward_stages.cuh"

namespace fastvae::cuda {

template <class T>
struct BackwardTask {
  Mixture<T> mix;
  Packed<T> packed;
  const T *log_prob, *grad;  // [M]; grad null: all ones
  bool negated, dense;
  T log_negligible;                      // of the skipping rule
  int splits = 1;                        // of the other side
  int chunks = 1;                        // of dimensions
  T* dz = nullptr;                       // [splits, M, D]
  T *dmu = nullptr, *dlogvar = nullptr;  // [splits, K, D]
  T* dweights = nullptr;                 // [splits, K]
  const int* only_tiles = nullptr;       // for each own tile: those that are not 0 are computed; null: all
};

// n numbers that lie together, loaded as widely as their alignment allows.
template <class T, int n>
struct alignas((n & -n) * sizeof(T) < 16 ? (n & -n) * sizeof(T) : 16) Together {
  T x[n];
};

template <class T, int n>
__device__ __forceinline__ void load_together(const T* from, T (&out)[n]) {
  const Together<T, n> all = *reinterpret_cast<const Together<T, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = all.x[i];
}

// What both sides share: the own items of a thread, and how it goes through the other side's items of a stage.
template <Side kSide, class T, int kDimensions>
struct SecondPass {
  using Shape = BackwardTile<kSide, T>;
  using Shared = BackwardShared<kSide, T>;
  static constexpr int kCount = Shape::kOwn / 16;  // own items of a thread: 8 rows or 4 components, or half as many
  static constexpr unsigned kAll = unsigned((uint64_t(1) << Shape::kItems) - 1);
  using Lines = T[kCount][kDimensions];

  // Where a thread's own items begin in the tile, and its dimensions in the stage.  The lanes 2 i and 2 i + 1 have the
  // same dimensions, so that loads of 16 bytes take half as many passes.
  static __device__ __forceinline__ int first_of(unsigned thread) { return int(thread / 32 * 2 + thread % 2) * kCount; }
  static __device__ __forceinline__ int column_of(unsigned thread) { return int(thread % 32 / 2) * kDimensions; }

  // Takes a thread's own from lines of `width` dimensions; 0 where it has no dimensions.  (Their old values must not
  // stay: they would take registers in the first pass.)
  static __device__ __forceinline__ void load_own_lines(const T* lines, int width, int own_tile, int first_dimension,
                                                        Lines& own) {
    const unsigned thread = thread_index();
    const int d = first_dimension + column_of(thread), offset = first_of(thread) * width + d;
    const T* from = lines + int64_t(own_tile) * Shape::kOwn * width;
#pragma unroll
    for (int o = 0; o < kCount; ++o) {
#pragma unroll
      for (int j = 0; j < kDimensions; ++j) own[o][j] = T(0);
      if constexpr (8 % kDimensions == 0) {  // as the width is a multiple of 8, all are there or none
        if (d < width) load_together(from + offset + o * width, own[o]);
      } else {
#pragma unroll
        for (int j = 0; j < kDimensions; ++j)
          if (d + j < width) own[o][j] = from[offset + o * width + j];
      }
    }
  }

  // Which items of a stage have a weight for one of the warp's own, a bit for each.  Each lane looks at a few weights.
  __device__ __forceinline__ unsigned active_items(const T (*weights)[Shared::kLine]) const {
    constexpr int kItems = Shape::kItems, n = 2 * kCount * kItems / 32;
    const unsigned thread = thread_index(), lane = thread % 32, first_of_warp = thread / 32 * 2 * kCount;
    T w[n];
    load_together(&weights[lane % kItems][first_of_warp + lane / kItems * n], w);
    bool some = false;
#pragma unroll
    for (int i = 0; i < n; ++i) some |= w[i] != T(0);
    unsigned found = __ballot_sync(0xFFFFFFFFu, some);
#pragma unroll
    for (int shift = kItems; shift < 32; shift *= 2) found |= found >> shift;
    return found & kAll;
  }

  // Calls add(i, column, w) for each item i of a stage that has a weight for one of the warp's own.  The thread's
  // dimensions begin at `column`, and w are the weights of its own items.
  template <class Add>
  __device__ __forceinline__ void for_each_active(const T (*weights)[Shared::kLine], const Add& add) const {
    const unsigned thread = thread_index();
    const int first = first_of(thread), column = column_of(thread);
    const auto add_item = [&](int i) {
      T w[kCount];
      load_together(&weights[i][first], w);
      add(i, column, w);
    };
    unsigned remaining = active_items(weights);
    if (remaining == kAll) {
#pragma unroll 4
      for (int i = 0; i < Shape::kItems; ++i) add_item(i);
    } else {
      for (; remaining; remaining &= remaining - 1) add_item(__ffs(int(remaining)) - 1);
    }
  }
};

template <Side kSide, class T, int kDimensions>
struct Sums;

template <class T, int kDimensions>
struct Sums<Side::rows, T, kDimensions> : SecondPass<Side::rows, T, kDimensions> {
  using Base = SecondPass<Side::rows, T, kDimensions>;
  using Base::kCount;
  using typename Base::Lines, typename Base::Shape, typename Base::Shared;
  Lines z, wuv = {};

  __device__ __forceinline__ void load_own(const Packed<T>& packed, int own_tile, int first_dimension) {
    Base::load_own_lines(packed.z, packed.width, own_tile, first_dimension, z);
  }

  static __device__ __forceinline__ void add_weights(Shared&) {}

  __device__ __forceinline__ void add(const T (&items)[2][Shape::kItems][kChunk], const T (*weights)[Shared::kLine]) {
    this->for_each_active(weights, [&](int i, int column, const T(&w)[kCount]) {
      T mu[kDimensions], v[kDimensions];
      load_together(&items[0][i][column], mu);
      load_together(&items[1][i][column], v);
#pragma unroll
      for (int o = 0; o < kCount; ++o) {
#pragma unroll
        for (int j = 0; j < kDimensions; ++j) wuv[o][j] = T(fma(w[o], (z[o][j] - mu[j]) * v[j], wuv[o][j]));
      }
    });
  }

  __device__ __forceinline__ void write(const BackwardTask<T>& task, int own_tile, int split, int first_dimension,
                                        Shared&) {
    const unsigned thread = thread_index();
    const int first = Base::first_of(thread), d = first_dimension + Base::column_of(thread);
#pragma unroll
    for (int o = 0; o < kCount; ++o) {
      const int64_t m = int64_t(own_tile) * Shape::kOwn + first + o;
      if (m >= task.mix.M) return;
      T* out = task.dz + (split * task.mix.M + m) * task.mix.D + d;
#pragma unroll
      for (int j = 0; j < kDimensions; ++j)
        if (d + j < task.mix.D) out[j] = -wuv[o][j];
    }
  }
};

template <class T, int kDimensions>
struct Sums<Side::components, T, kDimensions> : SecondPass<Side::components, T, kDimensions> {
  using Base = SecondPass<Side::components, T, kDimensions>;
  using Base::kCount;
  using typename Base::Lines, typename Base::Shape, typename Base::Shared;
  Lines mu, wu = {}, wuu = {};
  static constexpr int kGroups = kThreads / Shape::kOwn, kRowsOfGroup = Shape::kOther / kGroups;

  __device__ __forceinline__ void load_own(const Packed<T>& packed, int own_tile, int first_dimension) {
    Base::load_own_lines(packed.mu, packed.width, own_tile, first_dimension, mu);
  }

  // Of the weights, a thread adds up those of one component and of a group of the tile's rows.
  static __device__ __forceinline__ void add_weights(Shared& shared) {
    const unsigned thread = thread_index(), component = thread % Shape::kOwn, group = thread / Shape::kOwn;
    T sum = shared.w_sum[thread];
#pragma unroll 8
    for (int row = 0; row < kRowsOfGroup; ++row) sum += shared.weights[group * kRowsOfGroup + row][component];
    shared.w_sum[thread] = sum;
  }

  __device__ __forceinline__ void add(const T (&items)[1][Shape::kItems][kChunk], const T (*weights)[Shared::kLine]) {
    this->for_each_active(weights, [&](int i, int column, const T(&w)[kCount]) {
      T z[kDimensions];
      load_together(&items[0][i][column], z);
#pragma unroll
      for (int o = 0; o < kCount; ++o) {
#pragma unroll
        for (int j = 0; j < kDimensions; ++j) {
          const T u = z[j] - mu[o][j], product = w[o] * u;
          wu[o][j] += product;
          wuu[o][j] = T(fma(product, u, wuu[o][j]));
        }
      }
    });
  }

  __device__ __forceinline__ void write(const BackwardTask<T>& task, int own_tile, int split, int first_dimension,
                                        Shared& shared) {
    const unsigned thread = thread_index();
    const int first = Base::first_of(thread), d = first_dimension + Base::column_of(thread);
    __syncthreads();  // all have added their weights
#pragma unroll
    for (int o = 0; o < kCount; ++o) {
      const int64_t k = int64_t(own_tile) * Shape::kOwn + first + o;
      if (k >= task.mix.K) return;
      T sum = 0;
      for (int group = 0; group < kGroups; ++group) sum += shared.w_sum[group * Shape::kOwn + first + o];
      if (d == 0 && task.dweights) task.dweights[split * task.mix.K + k] = sum;
      const int64_t to = (split * task.mix.K + k) * task.mix.D + d;
      const T* v = task.packed.v + k * task.packed.width + d;
#pragma unroll
      for (int j = 0; j < kDimensions; ++j) {
        if (d + j >= task.mix.D) continue;
        if (task.dmu) task.dmu[to + j] = v[j] * wu[o][j];
        if (task.dlogvar) task.dlogvar[to + j] = T(0.5) * T(fma(v[j], wuu[o][j], -sum));
      }
    }
  }
};

}  // namespace fastvae::cuda
