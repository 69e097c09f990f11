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

// Sixteen bytes of an array that no kernel needs soon after: the L2 cache gives their place up first.
template <class T>
__device__ __forceinline__ Vector<T> streamed(const Vector<T>* from) {
  const int4 bits = __ldcs(reinterpret_cast<const int4*>(from));
  return reinterpret_cast<const Vector<T>&>(bits);
}
template <class T>
__device__ __forceinline__ void stream(const Vector<T>& piece, Vector<T>* to) {
  __stcs(reinterpret_cast<int4*>(to), reinterpret_cast<const int4&>(piece));
}

// Four numbers from p on, of which `count` exist; the others are 0.  With kOnce, the array is read once.
template <bool kVectors, bool kOnce = false, class T>
__device__ void load(const T* p, int64_t count, T (&out)[4]) {
  if constexpr (kVectors) {
    constexpr int n = 16 / sizeof(T);
    for (int v = 0; v < 4 / n; ++v) {
      const Vector<T>* from = reinterpret_cast<const Vector<T>*>(p) + v;
      const Vector<T> piece = kOnce ? streamed(from) : *from;
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
      stream(piece, reinterpret_cast<Vector<T>*>(p) + v);
    }
  } else {
    for (int j = 0; j < 4; ++j)
      if (j < count) p[j] = value[j];
  }
}

// A lane takes this many fours of a row at a time.  It asks for the numbers of all of them before it computes, so that
// enough bytes are on their way.  Where D <= 128, a lane has one four of a row.
template <bool kVectors, class T>
constexpr int kFours = kVectors && sizeof(T) == 4 ? 2 : 1;

// Calls body(i, d) for each of the n fours of a lane that exists: four i begins at dimension d.
template <int n, class Body>
__device__ __forceinline__ void each_four(int64_t begin, int64_t D, int width, const Body& body) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (const int64_t d = begin + 4 * i * width; d < D) body(i, d);
}

// log sigma^2 of component k in dimension d.
template <class T>
__device__ __forceinline__ T logvar_of(const Mixture<T>& mix, int64_t k, int64_t d) {
  return mix.logvar[(mix.shared ? 0 : k * mix.D) + d];
}

// How many lanes share a row.
FASTVAE_INLINE int group_width(int64_t D) { return D <= 32 ? 8 : D <= 64 ? 16 : 32; }

// The sum of x over the lanes of each group of `width`.
template <class T>
__device__ T group_sum(T x, int width) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    if (step < width) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// The sums of each group of `lanes` lanes, merged.
template <class Sum>
__device__ Sum merge_across(Sum sum, int lanes) {
  for (int step = 1; step < lanes; step *= 2)
    sum.merge({__shfl_xor_sync(0xFFFFFFFFu, sum.max, step), __shfl_xor_sync(0xFFFFFFFFu, sum.total, step)});
  return sum;
}

// Draws a row, z = mu + sigma eps, into task.z, and calls keep(d, z) for each four numbers of it.  Returns log q of the
// row, in every lane of its group.  A group without a row (inside = false) takes part and draws nothing.
template <bool kVectors, class T, class Keep>
__device__ __forceinline__ T draw_row(const Sample<T>& task, bool inside, int64_t row, int lane, int width,
                                      const Keep& keep) {
  constexpr int n = kFours<kVectors, T>;
  const uint64_t seed = uint64_t(*task.seed);
  T total = 0;
  if (inside) {
    const int64_t from = (task.S == 1 ? row : row % task.M) * task.D, to = row * task.D;
    for (int64_t begin = 4 * lane; begin < task.D; begin += 4 * n * width) {
      T mu[n][4], logvar[n][4];
      each_four<n>(begin, task.D, width, [&](int i, int64_t d) {
        load<kVectors>(task.mu + from + d, task.D - d, mu[i]);
        load<kVectors>(task.logvar + from + d, task.D - d, logvar[i]);
      });
      each_four<n>(begin, task.D, width, [&](int i, int64_t d) {
        T eps[4], z[4];
        normals_from<kVectors>(seed, to + d, eps);
        for (int j = 0; j < 4; ++j) {
          z[j] = T(fma(T(exp(T(0.5) * logvar[i][j])), eps[j], mu[i][j]));
          if (kVectors || d + j < task.D) total += T(fma(eps[j], eps[j], logvar[i][j]));
        }
        store<kVectors>(task.z + to + d, task.D - d, z);
        keep(int(d), z);
      });
    }
  }
  return T(-0.5) * (group_sum(total, width) + T(task.D) * T(kLog2Pi));
}

}  // namespace fastvae::cuda
