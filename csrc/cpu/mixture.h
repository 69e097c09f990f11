// The mixture density and its gradients over raw pointers.
//
//   u_mkd = z_md - mu_kd    v_kd = exp(-logvar_kd)    c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d u^2 v                      l_m = logsumexp_k a_mk
//   w_mk = g_m exp(a_mk - l_m)
//   dz_md = -sum_k w u v    dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)
//
// Components are packed chunk by chunk into scratch that stays in the cache (panels.h) and used by all rows of the task.
// Rows go by tiles against a batch of panels, in phases that each keep the multipliers busy: the exponents of the tiles
// that matter (tiles.h), all their exponentials, and with these the gradients.  Backward computes a again, except where
// M x K is so small that forward keeps it; nothing else of that size exists.  docs/developers/cpu-kernels.md has the reasons and the
// measurements.
#pragma once

#include "tiles.h"

namespace FASTVAE_ISA {

using fastvae::Forward;
using fastvae::Partial;

// R rows of z, transposed: [D, R], the dimensions in their places.
template <class T, int R>
void transpose_rows(const T* z, int64_t D, const int32_t* place, T* out) {
  for (int64_t d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r) out[place[d] * R + r] = z[r * D + d];
}

// rows[r][d] += sign * the sum of the lanes of dz[place of d][r], which becomes zero.
template <class T, int R>
void add_rows(T* dz, int64_t D, const int32_t* place, T sign, T* rows) {
  constexpr int W = kWidth<T>;
  for (int64_t d = 0; d < D; d += W) {
    T* sum[W];
    for (int i = 0; i < W; ++i) sum[i] = dz + place[min(d + i, D - 1)] * R * W;
    for (int r = 0; r < R; ++r) {
      Vec<T> v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        v[i] = load<T>(sum[i] + r * W);
        store<T>(sum[i] + r * W, Vec<T>{});
      }
      T* row = rows + r * D + d;
      store_up_to(row, load_up_to(row, D - d) + sign * sums<T>(v), D - d);
    }
  }
}

// Where a row's top starts: the lowest number, not -inf, because -inf minus -inf is NaN.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

constexpr int kMargin = 4;  // how far a term may exceed top before top is raised
constexpr int kMaxLaneSum = 1024;  // a batch's sum in a lane, over top, is less while none does: exp(kMargin) < 64
static_assert(2 * kBatch * 64 <= kMaxLaneSum);

// A term of this row exceeds top by more than the margin: what was summed so far shrinks to the new one.
template <class T, int R, bool SCORE>
__attribute__((noinline)) void raise_top(T raised, T* top, Partial<T>* partial, Vec<T>* total, T* dz, T* score,
                                         int64_t D) {
  const bool first = *top == kLowest<T>;  // nothing was summed
  const double shrink = first ? 0.0 : __builtin_exp(double(*top) - double(raised));
  *top = raised;
  partial->total *= shrink;
  *total *= T(shrink);
  if constexpr (SCORE) {
    for (int64_t d = 0; d < D; ++d) {
      T* sum = dz + d * R * kWidth<T>;
      store<T>(sum, load<T>(sum) * T(shrink));
      score[d] *= T(shrink);
    }
  }
}

// sum[r] = the terms of row r in a batch of tiles, over top[r]; with SCORE they are written over their exponents, those
// that do not matter as zeros.  False if a sum is so large that top may be too low.
template <class T, int R, bool SCORE>
inline __attribute__((always_inline)) bool sum_terms(const Tiles<T, R>& tiles, const Scratch<T>& scratch, const T* top,
                                                     const T* limit, Vec<T>* sum) {
  Mask<T> few = kEveryLane<T>;
  for (int r = 0; r < R; ++r) {
    Vec<T> sums[2] = {};
    for (int i = 0; i < tiles.count; ++i) {
      T* const a = tiles.tile(i) + r * kPanel<T>;
      Vec<T> x[2] = {load<T>(a) - top[r], load<T>(a + kWidth<T>) - top[r]};
      if constexpr (SCORE) {
        exp_terms<T>(x, least_term<T>(limit[r] - scratch.steep[tiles.index[i]], top[r]));
        sums[0] += x[0];
        sums[1] += x[1];
        store<T>(a, x[0]);
        store<T>(a + kWidth<T>, x[1]);
      } else {
        add_exp_terms<T>(x, sums);
      }
    }
    sum[r] = sums[0] + sums[1];
    few = below(sum[r], T(kMaxLaneSum), few);
  }
  return every_lane<T>(few);
}

// R rows against the packed panels; row counts from the beginning of the task's range.
template <class T, int R, bool SCORE>
void forward_rows(const Forward<T>& task, const Scratch<T>& scratch, const Extremes<T>& extremes, int64_t row,
                  int64_t first, int64_t panels) {
  const int64_t D = task.mixture.D;
  const int64_t* exclude = task.exclude ? task.exclude + task.range.row_begin + row : nullptr;
  // K terms this far below top add less than a rounding of T together.
  const T negligible = T(__builtin_log(double(task.mixture.K)) + (Format<T>::kMantissaBits + 3) * kLn2);
  transpose_rows<T, R>(task.z + (task.range.row_begin + row) * D, D, task.mixture.place, scratch.z);
  Partial<T>* partial = task.partial + row;
  T* score = task.score + row * D;
  T top[R], known[R], limit[R];
  for (int r = 0; r < R; ++r) {
    top[r] = partial[r].top;
    known[r] = task.known ? task.known[row + r] : kLowest<T>;
    limit[r] = limit_for<T>(top[r] > known[r] ? top[r] : known[r], negligible, task.mixture, extremes);
  }
  Vec<T> total[R] = {};

  Tiles<T, R> tiles(scratch, task.mixture, exclude, task.range.row_begin + row, first, panels, task.exponents);
  bool any = false, within = false;
  while (tiles.find(limit)) {
    any = true;
    Vec<T> sum[R];
    // Where no term can leave the range of exp, tops are looked at afterwards.
    if (SCORE || !within || !sum_terms<T, R, SCORE>(tiles, scratch, top, limit, sum)) {
      within = true;
      for (int r = 0; r < R; ++r) {
        const T* a = tiles.tile(0) + r * kPanel<T>;
        Vec<T> largest = broadcast<T>(kLowest<T>);  // a NaN is not, but comes out of exp
        for (int i = 0; i < tiles.count; ++i, a += R * kPanel<T>)
          largest = larger<T>(load<T>(a), larger<T>(load<T>(a + kWidth<T>), largest));
        if (!every_lane<T>(below(largest, top[r] + kMargin, kEveryLane<T>))) {
          raise_top<T, R, SCORE>(max<T>(largest), top + r, partial + r, total + r, scratch.dz + r * kWidth<T>,
                                 score + r * D, D);
          if (!(top[r] < known[r])) limit[r] = limit_for<T>(top[r], negligible, task.mixture, extremes);
        }
        within &= extremes.c - top[r] < Format<T>::kExpLimit - kMargin;
      }
      sum_terms<T, R, SCORE>(tiles, scratch, top, limit, sum);
    }
    for (int r = 0; r < R; ++r) total[r] += sum[r];
    if constexpr (SCORE) {
      for (int i = 0; i < tiles.count; ++i)
        tile_gradients<T, R, true, false, false>(scratch, tiles.index[i], D, tiles.tile(i));
    }
  }

  if (!any) return;
  for (int r = 0; r < R; ++r) {
    partial[r].top = top[r];
    partial[r].total += sum<T>(total[r]);
  }
  if constexpr (SCORE) add_rows<T, R>(scratch.dz, D, task.mixture.place, T(2), score);
}

// f of the rows by tiles of R, of what is left by tiles of half as many.
template <int R, class F>
void for_row_tiles(int64_t row, int64_t rows, const F& f) {
  for (; row + R <= rows; row += R) f.template operator()<R>(row);
  if constexpr (R > 1) for_row_tiles<R / 2>(row, rows, f);
}

// All rows of the range.  Smaller tiles leave out more, where components lie in order.
template <class T, class F>
void for_row_tiles(const Mixture<T>& mixture, int64_t rows, const F& f) {
  mixture.order ? for_row_tiles<kStrip>(0, rows, f) : for_row_tiles<kRows>(0, rows, f);
}

template <class T, bool SCORE>
struct ForwardRows {
  const Forward<T>& task;
  const Scratch<T>& scratch;
  const Extremes<T>& extremes;
  int64_t first, panels;
  template <int R>
  void operator()(int64_t row) const {
    forward_rows<T, R, SCORE>(task, scratch, extremes, row, first, panels);
  }
};

template <class T>
void mixture_forward(const Forward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D, task.mixture.shared, false);
  pack_shared(task.mixture, scratch);
  for (int64_t r = 0; r < rows; ++r) task.partial[r] = {kLowest<T>, 0.0};
  if (task.score) {
    __builtin_memset(task.score, 0, size_t(rows * D) * sizeof(T));
    scratch.clear_dz(D);
  }

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = min(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    const Extremes<T> extremes = pack<T>(task.mixture, k, count, scratch);
    if (task.score)
      for_row_tiles(task.mixture, rows, ForwardRows<T, true>{task, scratch, extremes, k, panels});
    else
      for_row_tiles(task.mixture, rows, ForwardRows<T, false>{task, scratch, extremes, k, panels});
  }
}

template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void backward_rows(const Backward<T>& task, const Scratch<T>& scratch, const Extremes<T>& extremes, int64_t row,
                   int64_t first, int64_t panels) {
  const int64_t D = task.mixture.D, m = task.range.row_begin + row;
  const int64_t* exclude = task.exclude ? task.exclude + m : nullptr;
  // K terms of less than 2^-24 / K (2^-53 / K in double) are less than a rounding together.
  const T negligible = T(__builtin_log(double(task.mixture.K)) + (Format<T>::kMantissaBits + 1) * kLn2);
  T log_prob[R], limit[R], grad[R];
  for (int r = 0; r < R; ++r) {
    const bool nowhere = task.log_prob[m + r] == T(-__builtin_inf());  // density zero, no gradient
    log_prob[r] = nowhere ? T(0) : task.log_prob[m + r];
    grad[r] = nowhere ? T(0) : task.grad[m + r];
    limit[r] = task.dense ? T(-__builtin_inf()) : limit_for<T>(log_prob[r], negligible, task.mixture, extremes);
  }
  transpose_rows<T, R>(task.z + m * D, D, task.mixture.place, scratch.z);

  Tiles<T, R> tiles(scratch, task.mixture, exclude, m, first, panels, task.exponents);
  bool any = false;
  while (task.exponents.a ? tiles.find_kept(limit) : tiles.find(limit)) {
    any = true;
    for (int i = 0; i < tiles.count; ++i) {
      T *w = tiles.tile(i), *weights = scratch.weights + tiles.index[i] * kPanel<T>, least[R];
      for (int r = 0; r < R; ++r) least[r] = least_term<T>(limit[r] - scratch.steep[tiles.index[i]], log_prob[r]);
      Vec<T> sum0 = load<T>(weights), sum1 = load<T>(weights + kWidth<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        T* a = w + r * kPanel<T>;
        Vec<T> e[2] = {load<T>(a) - log_prob[r], load<T>(a + kWidth<T>) - log_prob[r]};
        exp_terms<T>(e, least[r]);
        e[0] *= grad[r];
        e[1] *= grad[r];
        store<T>(a, e[0]);
        store<T>(a + kWidth<T>, e[1]);
        sum0 += e[0];
        sum1 += e[1];
      }
      store<T>(weights, sum0);
      store<T>(weights + kWidth<T>, sum1);
    }
    if constexpr (DZ || DMU || DLOGVAR) {
      for (int i = 0; i < tiles.count; ++i)
        tile_gradients<T, R, DZ, DMU, DLOGVAR>(scratch, tiles.index[i], D, tiles.tile(i));
    }
  }

  if (DZ && any) add_rows<T, R>(scratch.dz, D, task.mixture.place, T(-2), task.dz + row * D);
}

template <class T, bool DZ, bool DMU, bool DLOGVAR>
struct BackwardRows {
  const Backward<T>& task;
  const Scratch<T>& scratch;
  const Extremes<T>& extremes;
  int64_t first, panels;
  template <int R>
  void operator()(int64_t row) const {
    backward_rows<T, R, DZ, DMU, DLOGVAR>(task, scratch, extremes, row, first, panels);
  }
};

template <class T, bool DZ, bool DMU, bool DLOGVAR>
void mixture_backward_as(const Backward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D, task.mixture.shared, true);
  pack_shared(task.mixture, scratch);
  if (DZ) scratch.clear_dz(D);

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = min(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    const Extremes<T> extremes = pack<T>(task.mixture, k, count, scratch);
    __builtin_memset(scratch.weights, 0, size_t(panels * kPanel<T>) * sizeof(T));
    if (DMU || DLOGVAR) __builtin_memset(scratch.grads, 0, size_t(panels * D * 2 * kPanel<T>) * sizeof(T));
    for_row_tiles(task.mixture, rows, BackwardRows<T, DZ, DMU, DLOGVAR>{task, scratch, extremes, k, panels});
    unpack_gradients<T>(task, scratch, k, count);
  }
}

template <class T>
void mixture_backward(const Backward<T>& task) {
  using Function = void (*)(const Backward<T>&);
  static const Function by_need[2][2][2] = {
      {{mixture_backward_as<T, false, false, false>, mixture_backward_as<T, false, false, true>},
       {mixture_backward_as<T, false, true, false>, mixture_backward_as<T, false, true, true>}},
      {{mixture_backward_as<T, true, false, false>, mixture_backward_as<T, true, false, true>},
       {mixture_backward_as<T, true, true, false>, mixture_backward_as<T, true, true, true>}},
  };
  by_need[task.dz != nullptr][task.dmu != nullptr][task.dlogvar != nullptr](task);
}

template <class T>
int64_t mixture_scratch(int64_t D, bool shared) {
  return Scratch<T>::bytes(D, shared);
}

}  // namespace FASTVAE_ISA
