// A row of D numbers that a group of lanes shares: how they load it, store it, add it up and draw it.
#pragma once

#include "device_math.h"
#include "kernels.h"

namespace fastvae::cuda {

template <class T>
struct alignas(16) Vector {
  T x[16 / sizeof(T)];
};

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Four numbers from p on, of which `count` exist; the others are 0.
template <bool kVectors, class T>
__device__ void load(const T* p, int64_t count, T (&out)[4]) {
  if constexpr (kVectors) {
    constexpr int n = 16 / sizeof(T);
    for (int v = 0; v < 4 / n; ++v) {
      const Vector<T> piece = reinterpret_cast<const Vector<T>*>(p)[v];
      for (int j = 0; j < n; ++j) out[v * n + j] = piece.x[j];
    }
  } else {
    for (int j = 0; j < 4; ++j) out[j] = j < count ? p[j] : T(0);
  }
}

template <bool kVectors, class T>
__device__ void store(T* p, int64_t count, const T (&value)[4]) {
  if constexpr (kVectors) {
    constexpr int n = 16 / sizeof(T);
    for (int v = 0; v < 4 / n; ++v) {
      Vector<T> piece;
      for (int j = 0; j < n; ++j) piece.x[j] = value[v * n + j];
      reinterpret_cast<Vector<T>*>(p)[v] = piece;
    }
  } else {
    for (int j = 0; j < 4; ++j)
      if (j < count) p[j] = value[j];
  }
}

// How many lanes share a row.
FASTVAE_INLINE int group_width(int64_t D) { return D <= 32 ? 8 : D <= 64 ? 16 : 32; }

// The sum of x over the lanes of each group of `width`.
template <class T>
__device__ T group_sum(T x, int width) {
  for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// The sums of each group of `lanes` lanes, merged.
template <class T>
__device__ LogSum<T> merge_across(LogSum<T> sum, int lanes) {
  for (int step = 1; step < lanes; step *= 2)
    sum.merge({__shfl_xor_sync(0xFFFFFFFFu, sum.max, step), __shfl_xor_sync(0xFFFFFFFFu, sum.total, step)});
  return sum;
}

// Draws a row, z = mu + sigma eps, into task.z, and calls keep(d, z) for each four numbers of it.  Returns log q of the
// row, in every lane of its group.  A group without a row (inside = false) takes part and draws nothing.
template <bool kVectors, class T, class Keep>
__device__ __forceinline__ T draw_row(const Sample<T>& task, bool inside, int64_t row, int lane, int width,
                                      const Keep& keep) {
  const uint64_t seed = uint64_t(*task.seed);
  T total = 0;
  if (inside) {
    const int64_t from = row % task.M * task.D, to = row * task.D;
    for (int64_t d = 4 * lane; d < task.D; d += 4 * width) {
      T mu[4], logvar[4], eps[4], z[4];
      load<kVectors>(task.mu + from + d, task.D - d, mu);
      load<kVectors>(task.logvar + from + d, task.D - d, logvar);
      normals_from(seed, to + d, eps);
      for (int j = 0; j < 4; ++j) {
        z[j] = T(fma(T(exp(T(0.5) * logvar[j])), eps[j], mu[j]));
        if (d + j < task.D) total += T(fma(eps[j], eps[j], logvar[j]));
      }
      store<kVectors>(task.z + to + d, task.D - d, z);
      keep(int(d), z);
    }
  }
  return T(-0.5) * (group_sum(total, width) + T(task.D) * T(kLog2Pi));
}

}  // namespace fastvae::cuda
