// Panels: the components as the innermost loop reads them, and the way back of their gradients.
//
// A panel is 2 vectors of components, dimension by dimension: mu, and beside it v / 2.  Where components share one
// variance there is one v for all panels, and packing reads mu alone.
#pragma once

#include "../common/compensated.h"
#include "kernels.h"
#include "exp.h"

namespace FASTVAE_ISA {

using fastvae::Backward;
using fastvae::CompensatedSum;
using fastvae::Exponents;
using fastvae::Mixture;

template <class T>
constexpr int kPanel = 2 * kWidth<T>;  // components

// Rows of a tile; and of a strip of it, whose sums stay in registers: 8 x 2 vectors of 32, 4 x 2 of 16.
constexpr int kRows = 8;
constexpr int kStrip = kRegisters == 32 ? 8 : 4;

constexpr int kBatch = 8;  // panels that a tile of rows works on together

constexpr double kHalfLog2Pi = 0.918938533204672741780;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
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
  T* dz;          // [D, rows, kWidth]: sum_k w u v / 2, a vector of partial sums each; zero between tiles of rows
  T* z;           // [D, kRows]
  T* tiles;       // [kBatch, kRows, kPanel]

  // Of panel i.
  int64_t at(int64_t i) const { return i * panel; }
  int64_t v_at(int64_t i) const { return shared ? 0 : i * panel; }

  void clear_dz(int64_t D) const { __builtin_memset(dz, 0, size_t(D) * kRows * kBytes); }

  static int64_t bytes(int64_t D, bool shared) {
    const Scratch forward(nullptr, D, shared, false), backward(nullptr, D, shared, true);
    return int64_t(sizeof(T)) * max(forward.size, backward.size) + kBytes;
  }

  Scratch(void* memory, int64_t D, bool shared, bool gradients) : panel(kPanel<T> * D), shared(shared) {
    base = reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory), kBytes));
    chunk = max(1, min(64, (512 << 10) / ((gradients ? 4 : 2) * panel * int64_t(sizeof(T)))));
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

  Places(const Mixture<T>& mix, int64_t first, int64_t n) : count(min(n, kWidth<T>)) {
    for (int i = 0; i < count; ++i) {
      const int64_t later = min(mix.K - 1, first + kWidth<T> + i);
      k[i] = mix.order ? mix.order[first + i] : first + i;
      at[i] = k[i] * mix.D;
      next[i] = (mix.order ? mix.order[later] : later) * mix.D;
    }
  }

  // Whether there are as many components, and from d on as many dimensions, as lanes: a whole square.
  bool whole(int64_t d, int64_t D) const { return count == kWidth<T> && D - d >= kWidth<T>; }

  // x [K, D] at dimensions [d, D), transposed; zeros where there are fewer components or dimensions than lanes.
  template <bool kWhole>
  void load_transposed(const T* x, int64_t d, int64_t D, Vec<T> (&v)[kWidth<T>]) const {
    constexpr int W = kWidth<T>;
    if constexpr (kWhole) {
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
  template <bool kWhole>
  void store_transposed(Vec<T> (&v)[kWidth<T>], int64_t d, int64_t D, bool add, T* x) const {
    transpose<T>(v);
    if constexpr (kWhole) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth<T>; ++i) {
        T* out = x + at[i] + d;
        store<T>(out, add ? load<T>(out) + v[i] : v[i]);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        T* out = x + at[i] + d;
        store_up_to(out, add ? load_up_to(out, D - d) + v[i] : v[i], D - d);
      }
    }
  }
};

// The largest c and the largest steepness of a packed chunk.
template <class T>
struct Extremes {
  T c, steep;
};

// logvar becomes v / 2.  Finite, so that u = 0 gives 0 and not NaN.
template <class T>
inline __attribute__((always_inline)) void half_v_of(Vec<T> (&logvar)[2]) {
  for (Vec<T>& x : logvar) x = -clamp<T>(x);
  exponentials_within<T>(logvar);
  for (Vec<T>& x : logvar) x *= T(0.5);
}

// The v that all panels share, once a task.
template <class T>
void pack_shared(const Mixture<T>& mix, const Scratch<T>& scratch) {
  if (!mix.shared) return;
  for (int64_t d = 0; d < mix.D; ++d) {
    Vec<T> v[2] = {broadcast<T>(mix.logvar[d]), broadcast<T>(mix.logvar[d])};
    half_v_of<T>(v);
    for (int i = 0; i < 2; ++i) store<T>(scratch.v + mix.place[d] * kPanel<T> + i * kWidth<T>, v[i]);
  }
}

// One square of components and dimensions, from d on, into a panel.  One that is absent, by a weight of -inf or as the
// padding of the last panel, is mu = 0, v / 2 = 1: whatever its parameters are, it reaches nothing.
template <class T>
struct Square {
  const Mixture<T>& mix;
  const Places<T>& places;
  const Vec<Bits<T>> absent;
  T *mu, *v;
  Vec<T> narrow;                        // how far logvar is below the widest at most
  CompensatedSum<Vec<T>> logvar_sum{};  // over the dimensions so far

  template <bool kWhole>
  inline __attribute__((always_inline)) void pack(int64_t d) {
    constexpr int W = kWidth<T>;
    const int64_t n = kWhole ? W : min(W, mix.D - d);
    Vec<T> x[W];
    places.template load_transposed<kWhole>(mix.mu, d, mix.D, x);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store<T>(mu + mix.place[d + i] * kPanel<T>, absent ? Vec<T>{} : x[i]);
    if (mix.shared) return;
    places.template load_transposed<kWhole>(mix.logvar, d, mix.D, x);
    Vec<T> of_square{};  // by pairs, so that it rounds by few units at most
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2) {
      Vec<T> half_v[2] = {x[i], x[i + 1]};
      half_v_of<T>(half_v);
      of_square += x[i] + x[i + 1];  // lanes past the last dimension are 0
      for (int j = 0; j < 2 && i + j < n; ++j) {
        if (mix.widest) narrow = larger<T>(mix.widest[d + i + j] - x[i + j], narrow);
        store<T>(v + mix.place[d + i + j] * kPanel<T>, absent ? broadcast<T>(T(1)) : half_v[j]);
      }
    }
    logvar_sum.add(of_square);
  }
};

// Components [k, k + count) in order into panels, by squares of kWidth components and dimensions; c of one that is
// absent is -inf.
template <class T>
Extremes<T> pack(const Mixture<T>& mix, int64_t k, int64_t count, const Scratch<T>& scratch) {
  constexpr int W = kWidth<T>;
  const int64_t D = mix.D;
  const double minus_infinity = -__builtin_inf(), uniform = -__builtin_log(double(mix.K));
  Extremes<T> extremes = {T(minus_infinity), T(0)};
  CompensatedSum<T> shared_sum;
  if (mix.shared)
    for (int64_t d = 0; d < D; ++d) shared_sum.add(mix.logvar[d]);
  for (int64_t j = 0; j < round_up(count, kPanel<T>); j += W) {
    const Places<T> places(mix, k + j, count - j);
    double log_w[W];
    Vec<Bits<T>> absent;
    for (int i = 0; i < W; ++i) {
      log_w[i] = i >= places.count ? minus_infinity : mix.log_weights ? double(mix.log_weights[places.k[i]]) : uniform;
      absent[i] = log_w[i] == minus_infinity ? -1 : 0;
    }
    Square<T> square = {mix, places, absent,
                        scratch.mu + scratch.at(j / kPanel<T>) + j % kPanel<T>,
                        scratch.v + scratch.v_at(j / kPanel<T>) + j % kPanel<T>, Vec<T>{}};
    int64_t d = 0;
    for (; places.whole(d, D); d += W) square.template pack<true>(d);
    for (; d < D; d += W) square.template pack<false>(d);
    const Vec<T> narrow = square.narrow;
    T steep = j % kPanel<T> ? scratch.steep[j / kPanel<T>] : T(0);
    for (int i = 0; i < W; ++i) {
      const double logvar_sum = mix.shared ? fastvae::total_of(shared_sum.sum, shared_sum.lost)
                                           : fastvae::total_of(square.logvar_sum.sum[i], square.logvar_sum.lost[i]);
      const double c = log_w[i] - 0.5 * logvar_sum - double(D) * kHalfLog2Pi;
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

// The gradients of a square of packed components and dimensions, from d on: grads and v / 2 in the panel's layout, and
// the sums of the components' weights.
template <class T, bool kWhole>
inline __attribute__((always_inline)) void unpack_square(const Backward<T>& task, const Places<T>& places,
                                                         const T* grads, const T* v, Vec<T> weight, int64_t d) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D, n = kWhole ? W : min(W, D - d);
  const int32_t* place = task.mixture.place + d;
  if (task.dmu) {
    Vec<T> dmu[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      dmu[i] = T(2) * load<T>(v + place[i] * kPanel<T>) * load<T>(grads + place[i] * 2 * kPanel<T>);
    places.template store_transposed<kWhole>(dmu, d, D, task.add, task.dmu);
  }
  if (task.dlogvar) {
    Vec<T> dlogvar[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const Vec<T> squares = load<T>(grads + place[i] * 2 * kPanel<T> + kPanel<T>);
      dlogvar[i] = fma<T>(load<T>(v + place[i] * kPanel<T>), squares, T(-0.5) * weight);
      if (task.mixture.shared) task.dlogvar[d + i] += sum<T>(dlogvar[i]);
    }
    if (!task.mixture.shared) places.template store_transposed<kWhole>(dlogvar, d, D, task.add, task.dlogvar);
  }
}

// The gradients of `count` packed components, from the k-th in order on, into the task's outputs.
template <class T>
void unpack_gradients(const Backward<T>& task, const Scratch<T>& scratch, int64_t k, int64_t count) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D;
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
    if (!task.dmu && !task.dlogvar) continue;
    const T *grads = scratch.grads + 2 * scratch.at(panel) + lane, *v = scratch.v + scratch.v_at(panel) + lane;
    int64_t d = 0;
    for (; places.whole(d, D); d += W) unpack_square<T, true>(task, places, grads, v, weight, d);
    for (; d < D; d += W) unpack_square<T, false>(task, places, grads, v, weight, d);
  }
}

}  // namespace FASTVAE_ISA
