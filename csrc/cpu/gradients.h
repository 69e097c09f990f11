// The gradients of the parameters and of z: what a tile's weights add to them, and their way out of the panels' layout.
#pragma once

#include "panels.h"

namespace FASTVAE_ISA {

using fastvae::Backward;

// The second pass over a tile, with its weights w.  For each dimension and row, w u v / 2 is added to dz by lane; for
// each dimension of the panel, sum_r w u and sum_r w u^2 are added to grads.
template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void add_tile_gradients(const Scratch<T>& scratch, int64_t panel, int64_t D, const T* weights) {
  constexpr int W = kWidth<T>;
  const T *z = scratch.z, *mu = scratch.mu + scratch.at(panel), *v = scratch.v + scratch.v_at(panel);
  T *dz = scratch.dz, *grads = scratch.grads + 2 * scratch.at(panel);
  Vec<T> w[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    w[r][0] = load<T>(weights + r * kPanel<T>);
    w[r][1] = load<T>(weights + r * kPanel<T> + W);
  }
  for (int64_t d = 0; d < D; ++d) {
    const Vec<T> v0 = load<T>(v + d * kPanel<T>), v1 = load<T>(v + d * kPanel<T> + W);
    const Vec<T> mu0 = load<T>(mu + d * kPanel<T>), mu1 = load<T>(mu + d * kPanel<T> + W);
    Vec<T> dmu0{}, dmu1{}, dlogvar0{}, dlogvar1{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast<T>(z[d * R + r]);
      const Vec<T> u0 = x - mu0, u1 = x - mu1;
      const Vec<T> wu0 = w[r][0] * u0, wu1 = w[r][1] * u1;
      if constexpr (DZ) {
        T* sum = dz + (d * R + r) * W;
        store<T>(sum, fma<T>(wu1, v1, fma<T>(wu0, v0, load<T>(sum))));
      }
      if constexpr (DMU) {
        dmu0 += wu0;
        dmu1 += wu1;
      }
      if constexpr (DLOGVAR) {
        dlogvar0 = fma<T>(wu0, u0, dlogvar0);
        dlogvar1 = fma<T>(wu1, u1, dlogvar1);
      }
    }
    T* g = grads + d * 2 * kPanel<T>;
    if constexpr (DMU) {
      store<T>(g, load<T>(g) + dmu0);
      store<T>(g + W, load<T>(g + W) + dmu1);
    }
    if constexpr (DLOGVAR) {
      store<T>(g + 2 * W, load<T>(g + 2 * W) + dlogvar0);
      store<T>(g + 3 * W, load<T>(g + 3 * W) + dlogvar1);
    }
  }
}

// The gradients of a square of packed components and dimensions, from d on, into the task's outputs.  grads and v / 2
// are in the panel's layout; weight is sum_m w of each component.
template <class T, bool kWhole>
FASTVAE_INLINE void unpack_square(const Backward<T>& task, const Components<T>& components, const T* grads, const T* v,
                                  Vec<T> weight, int64_t d) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D, n = kWhole ? W : min(W, D - d);
  const int32_t* position = task.mixture.position + d;
  if (task.dmu) {
    Vec<T> dmu[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      dmu[i] = T(2) * load<T>(v + position[i] * kPanel<T>) * load<T>(grads + position[i] * 2 * kPanel<T>);
    components.template store_transposed<kWhole>(dmu, d, D, task.add, task.dmu);
  }
  if (task.dlogvar) {
    Vec<T> dlogvar[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const Vec<T> squares = load<T>(grads + position[i] * 2 * kPanel<T> + kPanel<T>);
      dlogvar[i] = fma<T>(load<T>(v + position[i] * kPanel<T>), squares, T(-0.5) * weight);
      if (task.mixture.shared) task.dlogvar[d + i] += sum<T>(dlogvar[i]);
    }
    if (!task.mixture.shared) components.template store_transposed<kWhole>(dlogvar, d, D, task.add, task.dlogvar);
  }
}

// The gradients of the chunk's components, into the task's outputs.
template <class T>
void unpack_gradients(const Backward<T>& task, const Scratch<T>& scratch, const Chunk<T>& chunk) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D;
  for (int64_t j = 0; j < chunk.count; j += W) {
    const int64_t panel = j / kPanel<T>, lane = j % kPanel<T>;
    const Components<T> components(task.mixture, chunk.first + j, chunk.count - j);
    const Vec<T> weight = load<T>(scratch.weights + j);
    if (task.dweights) {
      for (int i = 0; i < components.count; ++i) {
        T* out = task.dweights + components.k[i];
        *out = task.add ? *out + weight[i] : weight[i];
      }
    }
    if (!task.dmu && !task.dlogvar) continue;
    const T *grads = scratch.grads + 2 * scratch.at(panel) + lane, *v = scratch.v + scratch.v_at(panel) + lane;
    int64_t d = 0;
    for (; components.whole(d, D); d += W) unpack_square<T, true>(task, components, grads, v, weight, d);
    for (; d < D; d += W) unpack_square<T, false>(task, components, grads, v, weight, d);
  }
}

}  // namespace FASTVAE_ISA
