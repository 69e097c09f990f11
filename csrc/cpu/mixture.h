// The mixture density and its gradients over raw pointers.
//
//   s = exp(-logvar / 2)    t_mkd = (z_md - mu_kd) s_kd    c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d t_mkd^2                         l_m = logsumexp_k a_mk
//   w_mk = g_m exp(a_mk - l_m)
//   dz_md = -sum_k w t s     dmu_kd = s_kd sum_m w t          dlogvar_kd = 1/2 sum_m w (t^2 - 1)
//
// Components lie in panels of 2 vectors, d by d: s, then mu.  A register tile is kRows rows by one panel: a subtraction,
// a product and an fma an element (docs/cpu-kernels.md tells why not z s - mu s, which is one less).  Panels are packed
// chunk by chunk into scratch that stays in the cache, and used by all rows of the task.  Nothing of size M x K exists;
// backward computes a again.
#pragma once

#include "kernels.h"
#include "vector_math.h"

namespace FASTVAE_ISA {

using fastvae::Backward;
using fastvae::Forward;
using fastvae::Mixture;
using fastvae::Partial;

template <class T>
constexpr int kPanel = 2 * kWidth<T>;  // components

constexpr int kBlock = 64;  // dimensions summed before they join the total, which keeps the rounding error small

constexpr double kHalfLog2Pi = 0.918938533204672741780;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Panels of a chunk: packed parameters and their gradients in a quarter MiB, which is half the smallest L2 we meet.
template <class T>
int64_t chunk_panels(int64_t D) {
  return most(1, least(32, (256 << 10) / (4 * kPanel<T> * D * int64_t(sizeof(T)))));
}

// What one task needs beside its input and output, carved from one piece of memory.
template <class T>
struct Scratch {
  T* panels;   // [panels, D, 2, kPanel]
  T* c;        // [panels, kPanel]
  T* grads;    // [panels, D, 2, kPanel]: sum_m w t, and sum_m w t^2
  T* weights;  // [panels, kPanel]: sum_m w
  T* dz;       // [D, kRows, kWidth]: sum_k w t s, a vector of partial sums each
  T* z;        // [D, kRows]
  T* row;      // [D rounded up]: s of one component

  static int64_t bytes(int64_t D) { return int64_t(sizeof(T)) * Scratch(nullptr, D).size + kBytes; }

  Scratch(void* memory, int64_t D) {
    const int64_t panels_ = chunk_panels<T>(D);
    base = reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory), kBytes));
    panels = take(panels_ * D * 2 * kPanel<T>);
    c = take(panels_ * kPanel<T>);
    grads = take(panels_ * D * 2 * kPanel<T>);
    weights = take(panels_ * kPanel<T>);
    dz = take(D * kRows * kWidth<T>);
    z = take(D * kRows);
    row = take(round_up(D, kWidth<T>));
  }

 private:
  T* base;
  int64_t size = 0;
  T* take(int64_t n) {
    T* p = base + size;
    size += round_up(n, kWidth<T>);
    return p;
  }
};

// s of one component into row; returns the sum of its logvar.
template <class T>
T scales(const T* logvar, int64_t D, T* row) {
  Vec<T> logvar_sum{};
  for (int64_t d = 0; d < D; d += kWidth<T>) {
    const Vec<T> x = load_up_to(logvar + d, D - d);
    store<T>(row + d, exponential<T>(x * T(-0.5)).exp);
    logvar_sum += x;
  }
  return sum<T>(logvar_sum);
}

// Components [k, k + count) into panels.  One that is absent, by a weight of -inf or as the padding of the last panel,
// is mu = 0, s = 1, c = -inf: whatever its parameters are, it reaches nothing.
template <class T>
void pack(const Mixture<T>& mix, int64_t k, int64_t count, const Scratch<T>& scratch) {
  const int64_t D = mix.D;
  const double minus_infinity = -__builtin_inf(), uniform = -__builtin_log(double(mix.K));
  T logvar_sum = mix.shared ? scales<T>(mix.logvar, D, scratch.row) : T(0);
  for (int64_t j = 0; j < round_up(count, kPanel<T>); ++j) {
    T* column = scratch.panels + j / kPanel<T> * D * 2 * kPanel<T> + j % kPanel<T>;
    const double log_w = j >= count ? minus_infinity : mix.log_weights ? double(mix.log_weights[k + j]) : uniform;
    if (log_w == minus_infinity) {
      scratch.c[j] = T(minus_infinity);
      for (int64_t d = 0; d < D; ++d) {
        column[2 * d * kPanel<T>] = 1;
        column[(2 * d + 1) * kPanel<T>] = 0;
      }
      continue;
    }
    if (!mix.shared) logvar_sum = scales<T>(mix.logvar + (k + j) * D, D, scratch.row);
    scratch.c[j] = T(log_w - 0.5 * double(logvar_sum) - double(D) * kHalfLog2Pi);
    const T* mu = mix.mu + (k + j) * D;
    for (int64_t d = 0; d < D; ++d) {
      column[2 * d * kPanel<T>] = scratch.row[d];
      column[(2 * d + 1) * kPanel<T>] = mu[d];
    }
  }
}

// R rows of z, transposed: [D, R].
template <class T, int R>
void transpose_rows(const T* z, int64_t D, T* out) {
  for (int64_t d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r) out[d * R + r] = z[r * D + d];
}

// q[r][v] += sum over dimensions [begin, end) of t^2, of R rows and one panel: the innermost loop.
template <class T, int R>
inline __attribute__((always_inline)) void add_squares(const T* z, const T* panel, int64_t begin, int64_t end,
                                                       Vec<T> (&q)[R][2]) {
  constexpr int W = kWidth<T>;
  for (int64_t d = begin; d < end; ++d) {
    const T* p = panel + d * 2 * kPanel<T>;
    const Vec<T> s0 = load<T>(p), s1 = load<T>(p + W), mu0 = load<T>(p + 2 * W), mu1 = load<T>(p + 3 * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast<T>(z[d * R + r]);
      const Vec<T> t0 = (x - mu0) * s0, t1 = (x - mu1) * s1;
      q[r][0] = fma<T>(t0, t0, q[r][0]);
      q[r][1] = fma<T>(t1, t1, q[r][1]);
    }
  }
}

// a[r][v] = c - 1/2 sum_d t^2, with what each row excludes at -inf; first is the panel's first component.
template <class T, int R>
inline __attribute__((always_inline)) void tile_exponents(const T* z, const T* panel, int64_t D, const T* c,
                                                          const int64_t* exclude, int64_t first, Vec<T> (&a)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r][0] = a[r][1] = Vec<T>{};
  add_squares<T, R>(z, panel, 0, least(D, kBlock), a);
  for (int64_t begin = kBlock; begin < D; begin += kBlock) {
    Vec<T> more[R][2] = {};
    add_squares<T, R>(z, panel, begin, least(D, begin + kBlock), more);
    for (int r = 0; r < R; ++r) {
      a[r][0] += more[r][0];
      a[r][1] += more[r][1];
    }
  }
  const Vec<T> c0 = load<T>(c), c1 = load<T>(c + kWidth<T>);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    a[r][0] = fma<T>(a[r][0], broadcast<T>(T(-0.5)), c0);
    a[r][1] = fma<T>(a[r][1], broadcast<T>(T(-0.5)), c1);
  }
  if (!exclude) return;
  for (int r = 0; r < R; ++r) {
    const int64_t lane = exclude[r] - first;
    if (lane >= 0 && lane < kPanel<T>) a[r][lane / kWidth<T>][lane % kWidth<T>] = T(-__builtin_inf());
  }
}

// Whether any term of the tile reaches its row's limit; the first row that has one ends the search.
template <class T, int R>
inline bool tile_reaches(const Vec<T> (&a)[R][2], const T (&limit)[R]) {
  for (int r = 0; r < R; ++r)
    if (!all_below(a[r][0], a[r][1], limit[r])) return true;
  return false;
}

// The second pass over a tile, with its weights w: dz[d][r] += w t s by lane; for the panel, dmu[d] += sum_r w t and
// dlogvar[d] += sum_r w t^2.
template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void tile_gradients(const T* z, const T* panel, int64_t D, const Vec<T> (&w)[R][2], T* dz, T* grads) {
  constexpr int W = kWidth<T>;
  for (int64_t d = 0; d < D; ++d) {
    const T* p = panel + d * 2 * kPanel<T>;
    const Vec<T> s0 = load<T>(p), s1 = load<T>(p + W), mu0 = load<T>(p + 2 * W), mu1 = load<T>(p + 3 * W);
    Vec<T> dmu0{}, dmu1{}, dlogvar0{}, dlogvar1{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = broadcast<T>(z[d * R + r]);
      const Vec<T> t0 = (x - mu0) * s0, t1 = (x - mu1) * s1;
      const Vec<T> wt0 = w[r][0] * t0, wt1 = w[r][1] * t1;
      if constexpr (DZ) {
        T* sum = dz + (d * R + r) * W;
        store<T>(sum, fma<T>(wt1, s1, fma<T>(wt0, s0, load<T>(sum))));
      }
      if constexpr (DMU) {
        dmu0 += wt0;
        dmu1 += wt1;
      }
      if constexpr (DLOGVAR) {
        dlogvar0 = fma<T>(wt0, t0, dlogvar0);
        dlogvar1 = fma<T>(wt1, t1, dlogvar1);
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

// Term a of row r exceeds its maximum: what was summed so far shrinks to the new one.
template <class T, int R, bool SCORE>
__attribute__((noinline)) void raise_top(const Vec<T> (&a)[2], T* top, Partial<T>* partial, Vec<T>* total, T* dz,
                                         T* score, int64_t D) {
  const T raised = max<T>(a[1], max<T>(a[0], *top));
  const double shrink = __builtin_exp(double(*top) - double(raised));
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

// R rows against the packed panels; row counts from the beginning of the task's range.
template <class T, int R, bool SCORE>
void forward_rows(const Forward<T>& task, const Scratch<T>& scratch, int64_t row, int64_t first, int64_t panels) {
  const int64_t D = task.mixture.D;
  const int64_t* exclude = task.exclude ? task.exclude + task.range.row_begin + row : nullptr;
  // Terms this far below the maximum add less than a rounding of T together.
  const T negligible = T(__builtin_log(double(task.mixture.K)) + (Format<T>::kMantissaBits + 3) * kLn2);
  transpose_rows<T, R>(task.z + (task.range.row_begin + row) * D, D, scratch.z);
  Partial<T>* partial = task.partial + row;
  T* score = task.score + row * D;
  T top[R], limit[R];
  for (int r = 0; r < R; ++r) {
    top[r] = partial[r].top;
    limit[r] = top[r] - negligible;
  }
  Vec<T> total[R] = {};
  if constexpr (SCORE) __builtin_memset(scratch.dz, 0, size_t(D) * R * kBytes);

  for (int64_t p = 0; p < panels; ++p) {
    const T* panel = scratch.panels + p * D * 2 * kPanel<T>;
    Vec<T> a[R][2];
    tile_exponents<T, R>(scratch.z, panel, D, scratch.c + p * kPanel<T>, exclude, first + p * kPanel<T>, a);
    if (!tile_reaches<T, R>(a, limit)) continue;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (__builtin_expect(!all_below(a[r][0], a[r][1], top[r]), 0)) {
        raise_top<T, R, SCORE>(a[r], top + r, partial + r, total + r, scratch.dz + r * kWidth<T>, score + r * D, D);
        limit[r] = top[r] - negligible;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      a[r][0] = exp_term<T>(a[r][0] - top[r]);
      a[r][1] = exp_term<T>(a[r][1] - top[r]);
      total[r] += a[r][0] + a[r][1];
    }
    if constexpr (SCORE) tile_gradients<T, R, true, false, false>(scratch.z, panel, D, a, scratch.dz, nullptr);
  }

  for (int r = 0; r < R; ++r) {
    partial[r].top = top[r];
    partial[r].total += sum<T>(total[r]);
    if constexpr (SCORE) {
      for (int64_t d = 0; d < D; ++d) score[r * D + d] += sum<T>(load<T>(scratch.dz + (d * R + r) * kWidth<T>));
    }
  }
}

// All rows of the range by tiles of kRows, what is left by halves of it.
template <class T, int R, class F>
void for_row_tiles(int64_t row, int64_t rows, const F& f) {
  for (; row + R <= rows; row += R) f.template operator()<R>(row);
  if constexpr (R > 1) for_row_tiles<T, R / 2>(row, rows, f);
}

template <class T, bool SCORE>
struct ForwardRows {
  const Forward<T>& task;
  const Scratch<T>& scratch;
  int64_t first, panels;
  template <int R>
  void operator()(int64_t row) const {
    forward_rows<T, R, SCORE>(task, scratch, row, first, panels);
  }
};

template <class T>
void mixture_forward(const Forward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D);
  // The lowest number, not -inf, because -inf minus -inf is NaN.
  const T lowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);
  for (int64_t r = 0; r < rows; ++r) task.partial[r] = {lowest, 0.0};
  if (task.score) __builtin_memset(task.score, 0, size_t(rows * D) * sizeof(T));

  const int64_t step = chunk_panels<T>(D) * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = least(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    pack<T>(task.mixture, k, count, scratch);
    if (task.score)
      for_row_tiles<T, kRows>(0, rows, ForwardRows<T, true>{task, scratch, k, panels});
    else
      for_row_tiles<T, kRows>(0, rows, ForwardRows<T, false>{task, scratch, k, panels});
  }
}

template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void backward_rows(const Backward<T>& task, const Scratch<T>& scratch, int64_t row, int64_t first, int64_t panels) {
  const int64_t D = task.mixture.D, m = task.range.row_begin + row;
  const int64_t* exclude = task.exclude ? task.exclude + m : nullptr;
  // Responsibilities below 2^-24 / K (2^-53 / K in double) weigh less than a rounding together.
  const T negligible = T(__builtin_log(double(task.mixture.K)) + (Format<T>::kMantissaBits + 1) * kLn2);
  T log_prob[R], limit[R], grad[R];
  for (int r = 0; r < R; ++r) {
    const bool nowhere = task.log_prob[m + r] == T(-__builtin_inf());  // density zero, no gradient
    log_prob[r] = nowhere ? T(0) : task.log_prob[m + r];
    grad[r] = nowhere ? T(0) : task.grad[m + r];
    limit[r] = log_prob[r] - negligible;
  }
  transpose_rows<T, R>(task.z + m * D, D, scratch.z);
  if constexpr (DZ) __builtin_memset(scratch.dz, 0, size_t(D) * R * kBytes);

  for (int64_t p = 0; p < panels; ++p) {
    const T* panel = scratch.panels + p * D * 2 * kPanel<T>;
    Vec<T> w[R][2];
    tile_exponents<T, R>(scratch.z, panel, D, scratch.c + p * kPanel<T>, exclude, first + p * kPanel<T>, w);
    if (!task.dense && !tile_reaches<T, R>(w, limit)) continue;
    Vec<T> sum0{}, sum1{};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      w[r][0] = exp_term<T>(w[r][0] - log_prob[r]) * grad[r];
      w[r][1] = exp_term<T>(w[r][1] - log_prob[r]) * grad[r];
      sum0 += w[r][0];
      sum1 += w[r][1];
    }
    T* weights = scratch.weights + p * kPanel<T>;
    store<T>(weights, load<T>(weights) + sum0);
    store<T>(weights + kWidth<T>, load<T>(weights + kWidth<T>) + sum1);
    if constexpr (DZ || DMU || DLOGVAR)
      tile_gradients<T, R, DZ, DMU, DLOGVAR>(scratch.z, panel, D, w, scratch.dz,
                                             scratch.grads + p * D * 2 * kPanel<T>);
  }

  if constexpr (DZ) {
    for (int r = 0; r < R; ++r)
      for (int64_t d = 0; d < D; ++d)
        task.dz[(row + r) * D + d] -= sum<T>(load<T>(scratch.dz + (d * R + r) * kWidth<T>));
  }
}

template <class T, bool DZ, bool DMU, bool DLOGVAR>
struct BackwardRows {
  const Backward<T>& task;
  const Scratch<T>& scratch;
  int64_t first, panels;
  template <int R>
  void operator()(int64_t row) const {
    backward_rows<T, R, DZ, DMU, DLOGVAR>(task, scratch, row, first, panels);
  }
};

// The gradients of `count` packed components, which begin at offset k of the task's range, into its outputs.
template <class T>
void unpack_gradients(const Backward<T>& task, const Scratch<T>& scratch, int64_t k, int64_t count) {
  const int64_t D = task.mixture.D;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t column = j / kPanel<T> * D * 2 * kPanel<T> + j % kPanel<T>;
    const T weight = scratch.weights[j];
    if (task.dweights) task.dweights[k + j] += weight;
    if (task.dmu) {
      T* dmu = task.dmu + (k + j) * D;
      for (int64_t d = 0; d < D; ++d)
        dmu[d] += scratch.panels[column + 2 * d * kPanel<T>] * scratch.grads[column + 2 * d * kPanel<T>];
    }
    if (task.dlogvar && !task.mixture.shared) {
      T* dlogvar = task.dlogvar + (k + j) * D;
      for (int64_t d = 0; d < D; ++d)
        dlogvar[d] += T(0.5) * (scratch.grads[column + (2 * d + 1) * kPanel<T>] - weight);
    }
  }
  if (task.dlogvar && task.mixture.shared) {
    for (int64_t d = 0; d < D; ++d) {
      T total = 0;
      for (int64_t j = 0; j < count; ++j)
        total += scratch.grads[j / kPanel<T> * D * 2 * kPanel<T> + j % kPanel<T> + (2 * d + 1) * kPanel<T>] -
                 scratch.weights[j];
      task.dlogvar[d] += T(0.5) * total;
    }
  }
}

template <class T, bool DZ, bool DMU, bool DLOGVAR>
void mixture_backward_as(const Backward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D);

  const int64_t step = chunk_panels<T>(D) * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = least(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    pack<T>(task.mixture, k, count, scratch);
    __builtin_memset(scratch.weights, 0, size_t(panels * kPanel<T>) * sizeof(T));
    if (DMU || DLOGVAR) __builtin_memset(scratch.grads, 0, size_t(panels * D * 2 * kPanel<T>) * sizeof(T));
    for_row_tiles<T, kRows>(0, rows, BackwardRows<T, DZ, DMU, DLOGVAR>{task, scratch, k, panels});
    unpack_gradients<T>(task, scratch, k - task.range.component_begin, count);
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
int64_t mixture_scratch(int64_t D) {
  return Scratch<T>::bytes(D);
}

}  // namespace FASTVAE_ISA
