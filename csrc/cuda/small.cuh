// What the kernels for small problems share: how a block goes through all items of the other side.  An item is a
// component or a row.  One thread takes a whole item, so that its sums need no exchange with other threads.  The
// numbers pass through shared memory, because neighbouring threads want neighbouring items, which lie D numbers apart.
#pragma once

#include "tile.cuh"

namespace fastvae::cuda {

constexpr int kItemStages = 4;   // three are on their way while one is worked on: enough to hide memory's latency
constexpr int kItemVectors = 2;  // of an item in a stage: 32 bytes, the smallest piece that memory moves

// n items; an item is D numbers of each array.
template <class T, int kArrays>
struct Items {
  const T* from[kArrays];
  int64_t stride[kArrays];  // from one item to the next; 0 where all have the same numbers
  int n, D;
};

// Lines are four vectors longer than a block has threads, so that copies to neighbouring items' pieces take all banks.
template <class T, int kArrays>
struct ItemStage {
  Vector<T> lines[kArrays][kItemVectors][kThreads + 4];
};

// Copies items to shared memory, some stages ahead of their use.  With kVectors, items begin on a boundary of 16 bytes
// and are whole vectors.
template <bool kVectors, class T, int kArrays>
class ItemStream {
 public:
  // The first copies have begun when the constructor returns.
  __device__ __forceinline__ ItemStream(ItemStage<T, kArrays>* stages, const Items<T, kArrays>& items)
      : stages_(stages), items_(items), next_{0, 0, 0} {
    for (int i = 0; i < kItemStages - 1; ++i) copy();
  }

  // For each item of this thread: calls add(d, the numbers from d on in each array), in ascending order of d, and then
  // finish(item).  Numbers past D are 0.
  template <class Add, class Finish>
  __device__ __forceinline__ void run(const Add& add, const Finish& finish) {
    for (Cursor now{0, 0, 0}; now.begin < items_.n; advance(now)) {
      __pipeline_wait_prior(kItemStages - 2);
      __syncthreads();  // every thread's copies have arrived, and no thread reads the last stage any more
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

  // A block's items from `begin` on, their numbers from d on, and the stage that holds them.
  struct Cursor {
    int begin, d, stage;
  };

  __device__ __forceinline__ void advance(Cursor& cursor) const {
    cursor.d += kItemVectors * kVector;
    if (cursor.d >= items_.D) cursor.d = 0, cursor.begin += kThreads;
    cursor.stage = (cursor.stage + 1) % kItemStages;
  }

  // Begins to copy the next stage.  After the last one it still counts an empty stage, because run() waits for stages
  // by their number.
  __device__ __forceinline__ void copy() {
    ItemStage<T, kArrays>& stage = stages_[next_.stage];
#pragma unroll
    for (int i = 0; i < kItemVectors; ++i) {
      const int piece = i * kThreads + int(threadIdx.x), line = piece / kItemVectors, v = piece % kItemVectors;
      const int item = next_.begin + line, d = next_.d + v * kVector;
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
    advance(next_);
  }

  ItemStage<T, kArrays>* stages_;
  Items<T, kArrays> items_;
  Cursor next_;  // is copied next
};

// sum_d t^2 of an item: of the earlier blocks of kBlock dimensions, and of the current block.
template <class T>
struct SumOfSquares {
  T earlier = 0, block = 0;

  // Is called before dimension d, a multiple of kVector, is added.
  __device__ __forceinline__ void begin(int d) {
    if (d % kBlock) return;
    earlier += block;
    block = T(0);
  }
  __device__ __forceinline__ void add(T t) { block = T(fma(t, t, block)); }
  __device__ __forceinline__ T total() const { return earlier + block; }
};

// The sum of four (two) log variances of a component.  Forward and backward add them up in this one order, so that
// their exponents agree to the last bit.
template <class T>
__device__ __forceinline__ T sum_of(const Vector<T>& x) {
  if constexpr (Tile<T>::kVector == 4)
    return (x.x[0] + x.x[1]) + (x.x[2] + x.x[3]);
  else
    return x.x[0] + x.x[1];
}

// c_k, the exponent at the component's mean; -inf where it is absent.  uniform_log_weight is -log K.
template <class T>
__device__ __forceinline__ T max_exponent(const Mixture<T>& mix, double uniform_log_weight, int64_t k,
                                          const CompensatedSum<T>& logvar_sum) {
  const T log_weight = mix.log_weights ? mix.log_weights[k] : T(uniform_log_weight);
  if (log_weight == T(-INFINITY)) return log_weight;
  const double log_determinant = total_of(logvar_sum.sum, logvar_sum.compensation);
  return T((mix.log_weights ? double(log_weight) : uniform_log_weight) -
           0.5 * (log_determinant + double(mix.D) * kLog2Pi));
}

// How the threads of a block share sums over items for each dimension: `width` threads, one for each dimension from
// `begin` on, make a slice.  There are as many slices as there are threads for, and each takes a part of the items.
struct Slices {
  int width, count, index, d;
  __device__ Slices(int begin, int D) {
    width = D - begin < kThreads ? D - begin : kThreads;
    count = kThreads / width;
    index = int(threadIdx.x) / width;
    d = begin + int(threadIdx.x) % width;
  }
};

}  // namespace fastvae::cuda
