// What the kernels for small problems share: how a block goes through all items of the other side, which are components
// or rows.  A thread takes an item whole, so that its sums need no exchange; the numbers come from memory by shared
// memory, because neighbouring threads want neighbouring items, which lie D numbers apart.
#pragma once

#include "tile.cuh"

namespace fastvae::cuda {

constexpr int kItemStages = 4;   // three are on their way while one is worked on, as much as memory's latency hides
constexpr int kItemVectors = 2;  // of an item in a stage: 32 bytes, the least that memory moves

// n items, each D numbers of every array.
template <class T, int kArrays>
struct Items {
  const T* from[kArrays];
  int64_t stride[kArrays];  // from one item to the next; 0 where all have the same numbers
  int n, D;
};

// Lines are four vectors longer than a block is wide: so the copies of neighbouring items' pieces take all banks.
template <class T, int kArrays>
struct ItemStage {
  Vector<T> lines[kArrays][kItemVectors][kThreads + 4];
};

// kVectors: items begin on a boundary of 16 bytes and are whole vectors.
template <bool kVectors, class T, int kArrays>
class ItemStream {
 public:
  // The first copies are on their way when it returns.
  __device__ __forceinline__ ItemStream(ItemStage<T, kArrays>* stages, const Items<T, kArrays>& items)
      : stages_(stages), items_(items), ahead_{0, 0, 0} {
    for (int i = 0; i < kItemStages - 1; ++i) copy();
  }

  // For each item of this thread: add(d, numbers from d on in each array), in ascending order, then finish(item).  Past
  // D numbers are 0.
  template <class Add, class Finish>
  __device__ __forceinline__ void run(const Add& add, const Finish& finish) {
    for (Place now{0, 0, 0}; now.begin < items_.n; advance(now)) {
      __pipeline_wait_prior(kItemStages - 2);
      __syncthreads();  // the stage is there for all, and nobody reads the one before any more
      copy();
      const int item = now.begin + int(threadIdx.x);
      if (item >= items_.n) continue;
      const ItemStage<T, kArrays>& stage = stages_[now.stage];
#pragma unroll
      for (int v = 0; v < kItemVectors; ++v) {
        const int d = now.d + v * kVector;
        if (d >= items_.D) continue;
        Vector<T> numbers[kArrays];
#pragma unroll
        for (int a = 0; a < kArrays; ++a) numbers[a] = stage.lines[a][v][threadIdx.x];
        add(d, numbers);
      }
      if (now.d + kItemVectors * kVector >= items_.D) finish(item);
    }
  }

 private:
  static constexpr int kVector = Tile<T>::kVector;

  // A block's items from `begin` on, their numbers from d on, and the stage that these are in.
  struct Place {
    int begin, d, stage;
  };

  __device__ __forceinline__ void advance(Place& place) const {
    place.d += kItemVectors * kVector;
    if (place.d >= items_.D) place.d = 0, place.begin += kThreads;
    place.stage = (place.stage + 1) % kItemStages;
  }

  // Begins to copy the next stage; an empty one where all are done, since stages are waited for by their number.
  __device__ __forceinline__ void copy() {
    ItemStage<T, kArrays>& stage = stages_[ahead_.stage];
#pragma unroll
    for (int i = 0; i < kItemVectors; ++i) {
      const int piece = i * kThreads + int(threadIdx.x), line = piece / kItemVectors, v = piece % kItemVectors;
      const int item = ahead_.begin + line, d = ahead_.d + v * kVector;
      if (item >= items_.n || d >= items_.D) continue;
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        const T* from = items_.from[a] + item * items_.stride[a] + d;
        T* to = stage.lines[a][v][line].x;
        if constexpr (kVectors) {
          __pipeline_memcpy_async(to, from, 16);
        } else {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            if (d + j < items_.D)
              __pipeline_memcpy_async(to + j, from + j, sizeof(T));
            else
              to[j] = T(0);
          }
        }
      }
    }
    __pipeline_commit();
    advance(ahead_);
  }

  ItemStage<T, kArrays>* stages_;
  Items<T, kArrays> items_;
  Place ahead_;  // what is copied next
};

// sum_d t^2 of an item: of the blocks of kBlock dimensions before d's, and of d's block so far.
template <class T>
struct SumOfSquares {
  T earlier = 0, block = 0;

  // Before dimension d, a multiple of kVector, is added.
  __device__ __forceinline__ void begin(int d) {
    if (d % kBlock) return;
    earlier += block;
    block = T(0);
  }
  __device__ __forceinline__ void add(T t) { block = T(fma(t, t, block)); }
  __device__ __forceinline__ T total() const { return earlier + block; }
};

// The log variances of a component are added up four (two) at a time, in one order everywhere, so that backward's
// exponents are forward's to the last bit.
template <class T>
__device__ __forceinline__ T sum_of(const Vector<T>& x) {
  if constexpr (Tile<T>::kVector == 4)
    return (x.x[0] + x.x[1]) + (x.x[2] + x.x[3]);
  else
    return x.x[0] + x.x[1];
}

// c_k, -inf for a component that is absent.  `uniform` is -log K.
template <class T>
__device__ __forceinline__ T largest_exponent(const Mixture<T>& mix, double uniform, int64_t k,
                                              const CompensatedSum<T>& logvar_sum) {
  const T log_weight = mix.log_weights ? mix.log_weights[k] : T(uniform);
  if (log_weight == T(-INFINITY)) return log_weight;
  const double log_determinant = total_of(logvar_sum.sum, logvar_sum.compensation);
  return T((mix.log_weights ? double(log_weight) : uniform) - 0.5 * (log_determinant + double(mix.D) * kLog2Pi));
}

// A block's sums over items, for dimensions d: 256 threads are as many dimensions as there are, and as many slices of
// the items as there is room for.
struct Slices {
  int width, count, mine, d;
  __device__ Slices(int begin, int D) {
    width = D - begin < kThreads ? D - begin : kThreads;
    count = kThreads / width;
    mine = int(threadIdx.x) / width;
    d = begin + int(threadIdx.x) % width;
  }
};

}  // namespace fastvae::cuda
