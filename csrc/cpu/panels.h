// Panels: the components as the innermost loop reads them.
//
// A panel holds two vectors of components, dimension by dimension: mu, and beside it v / 2.  Where components share one
// variance, there is one v for all panels, and packing reads mu alone.
#pragma once

#include "../common/compensated.h"
#include "exp.h"
#include "kernels.h"
#include "scratch.h"

namespace FASTVAE_ISA {

using fastvae::CompensatedSum;
using fastvae::Mixture;

constexpr double kHalfLog2Pi = 0.918938533204672741780;

// Up to kWidth components in order, from the one with index `first` on: their indices k in the mixture, and where their
// parameters begin in an array [K, D]; and for as many components after them, to be prefetched.
template <class T>
struct Components {
  int64_t count, k[kWidth<T>], begin[kWidth<T>], next_begin[kWidth<T>];

  Components(const Mixture<T>& mix, int64_t first, int64_t n) : count(min(n, kWidth<T>)) {
    for (int i = 0; i < count; ++i) {
      const int64_t later = min(mix.K - 1, first + kWidth<T> + i);
      k[i] = mix.order ? mix.order[first + i] : first + i;
      begin[i] = k[i] * mix.D;
      next_begin[i] = (mix.order ? mix.order[later] : later) * mix.D;
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
        v[i] = load<T>(x + begin[i] + d);
        __builtin_prefetch(x + next_begin[i] + d);
      }
    } else {
      for (int i = 0; i < W; ++i) v[i] = i < count ? load_up_to(x + begin[i] + d, D - d) : Vec<T>{};
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
        T* out = x + begin[i] + d;
        store<T>(out, add ? load<T>(out) + v[i] : v[i]);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        T* out = x + begin[i] + d;
        store_up_to(out, add ? load_up_to(out, D - d) + v[i] : v[i], D - d);
      }
    }
  }
};

// Components that are packed together.
template <class T>
struct Chunk {
  int64_t first, count;  // `first` counts in the mixture's order
  T max_c = T(-__builtin_inf()), max_log_sigma_ratio = 0;

  int64_t panels() const { return (count + kPanel<T> - 1) / kPanel<T>; }
};

// logvar becomes v / 2.  Finite, so that u = 0 gives 0 and not NaN.
template <class T>
FASTVAE_INLINE void half_v_of(Vec<T> (&logvar)[2]) {
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
    for (int i = 0; i < 2; ++i) store<T>(scratch.v + mix.position[d] * kPanel<T> + i * kWidth<T>, v[i]);
  }
}

// Packs the parameters of up to kWidth components, a square of components and dimensions at a time.  An absent
// component has a weight of -inf, or is the padding of the last panel.  It gets mu = 0 and v / 2 = 1, so that its own
// parameters, whatever they are, have no effect.
template <class T>
struct Packer {
  const Mixture<T>& mix;
  const Components<T>& components;
  const Vec<Bits<T>> absent;
  T *mu, *v;                            // in the panel
  Vec<T> max_gap;                       // the largest max_logvar - logvar of the dimensions so far: 2 log sigma ratio
  CompensatedSum<Vec<T>> logvar_sum{};  // over the dimensions so far

  template <bool kWhole>
  FASTVAE_INLINE void pack(int64_t d) {
    constexpr int W = kWidth<T>;
    const int64_t n = kWhole ? W : min(W, mix.D - d);
    Vec<T> x[W];
    components.template load_transposed<kWhole>(mix.mu, d, mix.D, x);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) store<T>(mu + mix.position[d + i] * kPanel<T>, absent ? Vec<T>{} : x[i]);
    if (mix.shared) return;
    components.template load_transposed<kWhole>(mix.logvar, d, mix.D, x);
    Vec<T> square_sum{};  // by pairs, so that it rounds by few units at most
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2) {
      Vec<T> half_v[2] = {x[i], x[i + 1]};
      half_v_of<T>(half_v);
      square_sum += x[i] + x[i + 1];  // lanes past the last dimension are 0
      for (int j = 0; j < 2 && i + j < n; ++j) {
        if (mix.max_logvar) max_gap = larger<T>(mix.max_logvar[d + i + j] - x[i + j], max_gap);
        store<T>(v + mix.position[d + i + j] * kPanel<T>, absent ? broadcast<T>(T(1)) : half_v[j]);
      }
    }
    logvar_sum.add(square_sum);
  }
};

// Packs `count` components in order, from index `first` on.  c of an absent one is -inf.
template <class T>
Chunk<T> pack(const Mixture<T>& mix, int64_t first, int64_t count, const Scratch<T>& scratch) {
  constexpr int W = kWidth<T>;
  const int64_t D = mix.D;
  const double minus_infinity = -__builtin_inf(), uniform = -__builtin_log(double(mix.K));
  Chunk<T> chunk{first, count};
  CompensatedSum<T> shared_sum;
  if (mix.shared)
    for (int64_t d = 0; d < D; ++d) shared_sum.add(mix.logvar[d]);
  for (int64_t j = 0; j < round_up(count, kPanel<T>); j += W) {
    const int64_t panel = j / kPanel<T>, lane = j % kPanel<T>;
    const Components<T> components(mix, first + j, count - j);
    double log_w[W];
    Vec<Bits<T>> absent;
    for (int i = 0; i < W; ++i) {
      log_w[i] = i >= components.count ? minus_infinity
                 : mix.log_weights     ? double(mix.log_weights[components.k[i]])
                                       : uniform;
      absent[i] = log_w[i] == minus_infinity ? -1 : 0;
    }
    T *mu = scratch.mu + scratch.at(panel) + lane, *v = scratch.v + scratch.v_at(panel) + lane;
    Packer<T> packer = {mix, components, absent, mu, v, Vec<T>{}};
    int64_t d = 0;
    for (; components.whole(d, D); d += W) packer.template pack<true>(d);
    for (; d < D; d += W) packer.template pack<false>(d);
    const Vec<T> max_gap = packer.max_gap;
    T log_sigma_ratio = lane ? scratch.log_sigma_ratio[panel] : T(0);
    for (int i = 0; i < W; ++i) {
      const double logvar_sum = mix.shared
                                    ? fastvae::total_of(shared_sum.sum, shared_sum.compensation)
                                    : fastvae::total_of(packer.logvar_sum.sum[i], packer.logvar_sum.compensation[i]);
      const double c = log_w[i] - 0.5 * logvar_sum - double(D) * kHalfLog2Pi;
      scratch.c[j + i] = T(absent[i] ? minus_infinity : c);
      if (absent[i]) continue;
      if (T(c) > chunk.max_c) chunk.max_c = T(c);
      if (max_gap[i] > 2 * log_sigma_ratio) log_sigma_ratio = max_gap[i] / 2;
    }
    scratch.log_sigma_ratio[panel] = log_sigma_ratio;
    if (log_sigma_ratio > chunk.max_log_sigma_ratio) chunk.max_log_sigma_ratio = log_sigma_ratio;
  }
  return chunk;
}

}  // namespace FASTVAE_ISA
