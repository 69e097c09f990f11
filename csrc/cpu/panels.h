// Panels: the components as the innermost loop reads them, and the way back of their gradients.
//
// A panel is 2 vectors of components, dimension by dimension: mu, and beside it v / 2.  Where components share one
// variance there is one v for all panels, and packing reads mu alone.
#pragma once

#include "kernels.h"
#include "vector_math.h"

namespace FASTVAE_ISA {

using fastvae::Backward;
using fastvae::Mixture;

template <class T>
constexpr int kPanel = 2 * kWidth<T>;  // components

constexpr int kBatch = 8;  // panels that a tile of rows works on together

constexpr double kHalfLog2Pi = 0.918938533204672741780;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one task needs beside its input and output, carved from one piece of memory.  A chunk of panels, and in backward
// its gradients, takes half a MiB: what stays in the L2 cache of today's cores.
template <class T>
struct Scratch {
  int64_t chunk;  // panels
  T* mu;          // [chunk, D, kPanel]
  T* v;           // [chunk, D, kPanel], halved; shared: [1, D, kPanel]
  T* c;           // [chunk, kPanel]
  T* steep;       // [chunk]: log of the largest ratio of a component's 1 / sigma_d to the least one of all components
  T* grads;       // [chunk, D, 2, kPanel]: sum_m w u, and sum_m w u^2; backward only
  T* weights;     // [chunk, kPanel]: sum_m w
  T* dz;          // [D, kRows, kWidth]: sum_k w u v / 2, a vector of partial sums each
  T* z;           // [D, kRows]
  T* tiles;       // [kBatch, kRows, kPanel]

  // Of panel i.
  int64_t at(int64_t i) const { return i * panel; }
  int64_t v_at(int64_t i) const { return shared ? 0 : i * panel; }

  static int64_t bytes(int64_t D, bool shared) {
    const Scratch forward(nullptr, D, shared, false), backward(nullptr, D, shared, true);
    return int64_t(sizeof(T)) * most(forward.size, backward.size) + kBytes;
  }

  Scratch(void* memory, int64_t D, bool shared, bool gradients) : panel(kPanel<T> * D), shared(shared) {
    base = reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory), kBytes));
    chunk = most(1, least(64, (512 << 10) / ((gradients ? 4 : 2) * panel * int64_t(sizeof(T)))));
    mu = take(chunk * panel);
    v = take(shared ? panel : chunk * panel);
    c = take(chunk * kPanel<T>);
    steep = take(chunk);
    grads = take(gradients ? 2 * chunk * panel : 0);
    weights = take(chunk * kPanel<T>);
    dz = take(D * kRows * kWidth<T>);
    z = take(D * kRows);
    tiles = take(kBatch * kRows * kPanel<T>);
  }

 private:
  int64_t panel;  // numbers in one array of a panel
  bool shared;
  T* base;
  int64_t size = 0;
  T* take(int64_t n) {
    T* p = base + size;
    size += round_up(n, kWidth<T>);
    return p;
  }
};

// Where the parameters of up to kWidth components begin, from the k-th in order on; and those of as many after them.
template <class T>
struct Places {
  int64_t count, k[kWidth<T>], at[kWidth<T>], next[kWidth<T>];

  Places(const Mixture<T>& mix, int64_t first, int64_t n) : count(least(n, kWidth<T>)) {
    for (int i = 0; i < count; ++i) {
      const int64_t later = least(mix.K - 1, first + kWidth<T> + i);
      k[i] = mix.order ? mix.order[first + i] : first + i;
      at[i] = k[i] * mix.D;
      next[i] = (mix.order ? mix.order[later] : later) * mix.D;
    }
  }

  // x [K, D] at dimensions [d, D), transposed; zeros where there are fewer components or dimensions than lanes.
  void load_transposed(const T* x, int64_t d, int64_t D, Vec<T> (&v)[kWidth<T>]) const {
    constexpr int W = kWidth<T>;
    if (count == W && D - d >= W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        v[i] = load<T>(x + at[i] + d);
        __builtin_prefetch(x + next[i] + d);
      }
    } else {
      for (int i = 0; i < W; ++i) v[i] = i < count ? load_up_to(x + at[i] + d, D - d) : Vec<T>{};
    }
    transpose<T>(v);
  }

  // The way back: v, which is used up, is written or added to x.
  void store_transposed(Vec<T> (&v)[kWidth<T>], int64_t d, int64_t D, bool add, T* x) const {
    transpose<T>(v);
    for (int i = 0; i < count; ++i) {
      T* out = x + at[i] + d;
      store_up_to(out, add ? load_up_to(out, D - d) + v[i] : v[i], D - d);
    }
  }
};

// The largest c and the largest steepness of a packed chunk.
template <class T>
struct Extremes {
  T c, steep;
};

// v / 2.  Finite, so that u = 0 gives 0 and not NaN.
template <class T>
inline Vec<T> half_v_of(Vec<T> logvar) {
  const Vec<T> limit = broadcast<T>(-Format<T>::kExpLimit);
  return exponential<T>(-(logvar < limit ? limit : logvar)).exp * T(0.5);
}

// The v that all panels share, once a task.
template <class T>
void pack_shared(const Mixture<T>& mix, const Scratch<T>& scratch) {
  if (!mix.shared) return;
  for (int64_t d = 0; d < mix.D; ++d) {
    const Vec<T> v = half_v_of<T>(broadcast<T>(mix.logvar[d]));
    for (int i = 0; i < 2; ++i) store<T>(scratch.v + mix.place[d] * kPanel<T> + i * kWidth<T>, v);
  }
}

// Components [k, k + count) in order into panels, by squares of kWidth components and dimensions.  One that is absent, by
// a weight of -inf or as the padding of the last panel, is mu = 0, v / 2 = 1, c = -inf: whatever its parameters are, it
// reaches nothing.
template <class T>
Extremes<T> pack(const Mixture<T>& mix, int64_t k, int64_t count, const Scratch<T>& scratch) {
  constexpr int W = kWidth<T>;
  const int64_t D = mix.D;
  const double minus_infinity = -__builtin_inf(), uniform = -__builtin_log(double(mix.K));
  Extremes<T> extremes = {T(minus_infinity), T(0)};
  T shared_sum = 0;
  if (mix.shared)
    for (int64_t d = 0; d < D; ++d) shared_sum += mix.logvar[d];
  for (int64_t j = 0; j < round_up(count, kPanel<T>); j += W) {
    T *panel_mu = scratch.mu + scratch.at(j / kPanel<T>) + j % kPanel<T>,
      *panel_v = scratch.v + scratch.v_at(j / kPanel<T>) + j % kPanel<T>;
    const Places<T> places(mix, k + j, count - j);
    double log_w[W];
    Vec<Bits<T>> absent;
    for (int i = 0; i < W; ++i) {
      log_w[i] = i >= places.count ? minus_infinity : mix.log_weights ? double(mix.log_weights[places.k[i]]) : uniform;
      absent[i] = log_w[i] == minus_infinity ? -1 : 0;
    }
    Vec<T> logvar_sum = broadcast<T>(shared_sum), narrow{};
    for (int64_t d = 0; d < D; d += W) {
      Vec<T> mu[W], logvar[W];
      places.load_transposed(mix.mu, d, D, mu);
      for (int i = 0; i < W && d + i < D; ++i)
        store<T>(panel_mu + mix.place[d + i] * kPanel<T>, absent ? Vec<T>{} : mu[i]);
      if (mix.shared) continue;
      places.load_transposed(mix.logvar, d, D, logvar);
      for (int i = 0; i < W && d + i < D; ++i) {
        logvar_sum += logvar[i];
        if (mix.widest) {
          const Vec<T> below_widest = mix.widest[d + i] - logvar[i];
          narrow = below_widest > narrow ? below_widest : narrow;
        }
        store<T>(panel_v + mix.place[d + i] * kPanel<T>,
                 absent ? broadcast<T>(T(1)) : half_v_of<T>(logvar[i]));
      }
    }
    T steep = j % kPanel<T> ? scratch.steep[j / kPanel<T>] : T(0);
    for (int i = 0; i < W; ++i) {
      const double c = log_w[i] - 0.5 * double(logvar_sum[i]) - double(D) * kHalfLog2Pi;
      scratch.c[j + i] = T(absent[i] ? minus_infinity : c);
      if (absent[i]) continue;
      if (T(c) > extremes.c) extremes.c = T(c);
      if (narrow[i] > 2 * steep) steep = narrow[i] / 2;
    }
    scratch.steep[j / kPanel<T>] = steep;
    if (steep > extremes.steep) extremes.steep = steep;
  }
  return extremes;
}

// The gradients of `count` packed components, from the k-th in order on, into the task's outputs.
template <class T>
void unpack_gradients(const Backward<T>& task, const Scratch<T>& scratch, int64_t k, int64_t count) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D;
  const int32_t* place = task.mixture.place;
  for (int64_t j = 0; j < count; j += W) {
    const int64_t panel = j / kPanel<T>, lane = j % kPanel<T>;
    const Places<T> places(task.mixture, k + j, count - j);
    const Vec<T> weight = load<T>(scratch.weights + j);
    if (task.dweights) {
      for (int i = 0; i < places.count; ++i) {
        T* out = task.dweights + places.k[i];
        *out = task.add ? *out + weight[i] : weight[i];
      }
    }
    for (int64_t d = 0; d < D; d += W) {
      Vec<T> dmu[W], dlogvar[W];
      for (int i = 0; i < W; ++i) {
        dmu[i] = dlogvar[i] = Vec<T>{};
        if (d + i >= D) continue;
        const int64_t p = place[d + i] * kPanel<T> + lane;
        const T* grads = scratch.grads + 2 * scratch.at(panel) + p + place[d + i] * kPanel<T>;
        const Vec<T> v = load<T>(scratch.v + scratch.v_at(panel) + p) * T(2);
        if (task.dmu) dmu[i] = v * load<T>(grads);
        if (task.dlogvar) dlogvar[i] = T(0.5) * fma<T>(v, load<T>(grads + kPanel<T>), -weight);
        if (task.dlogvar && task.mixture.shared) task.dlogvar[d + i] += sum<T>(dlogvar[i]);
      }
      if (task.dmu) places.store_transposed(dmu, d, D, task.add, task.dmu);
      if (task.dlogvar && !task.mixture.shared) places.store_transposed(dlogvar, d, D, task.add, task.dlogvar);
    }
  }
}

}  // namespace FASTVAE_ISA
