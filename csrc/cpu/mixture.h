// The mixture density and its gradients over raw pointers.
//
//   u_mkd = z_md - mu_kd    v_kd = exp(-logvar_kd)    c_k = log w_k - 1/2 sum_d logvar_kd - D/2 log 2 pi
//   a_mk = c_k - 1/2 sum_d u^2 v                      l_m = logsumexp_k a_mk
//   w_mk = g_m exp(a_mk - l_m)
//   dz_md = -sum_k w u v    dmu_kd = v_kd sum_m w u   dlogvar_kd = 1/2 (v_kd sum_m w u^2 - sum_m w)
//
// Components lie in panels of 2 vectors, dimension by dimension: v, then mu.  A register tile is kRows rows by one
// panel: a subtraction, a product and an fma an element.  Panels are packed chunk by chunk into scratch that stays in
// the cache, and used by all rows of the task.  Nothing of size M x K exists; backward computes a again.
//
// As a only falls while its sum over d grows, a tile whose terms are all negligible after some dimensions needs no
// others.  docs/cpu-kernels.md has the reasons and the measurements.
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

// Dimensions are summed in registers a block at a time, which keeps the rounding error small, with looks at whether the
// tile still matters.
constexpr int kBlock = 64, kFirstLook = 8, kLook = 16;

constexpr int kBatch = 8;  // tiles that are worked on together

constexpr double kHalfLog2Pi = 0.918938533204672741780;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one task needs beside its input and output, carved from one piece of memory.  A chunk of panels, and in backward
// its gradients, takes half a MiB: what stays in the L2 cache of today's cores.
template <class T>
struct Scratch {
  int64_t chunk;  // panels
  T* panels;      // [chunk, D, 2, kPanel]: v / 2, mu
  T* c;           // [chunk, kPanel]
  T* steep;       // [chunk]: log of the largest ratio of a component's 1 / sigma_d to the least one of all components
  T* grads;       // [chunk, D, 2, kPanel]: sum_m w u, and sum_m w u^2; backward only
  T* weights;     // [chunk, kPanel]: sum_m w
  T* dz;          // [D, kRows, kWidth]: sum_k w u v / 2, a vector of partial sums each
  T* z;           // [D, kRows]
  T* tiles;       // [kBatch, kRows, kPanel]

  static int64_t bytes(int64_t D) {
    const Scratch forward(nullptr, D, false), backward(nullptr, D, true);
    return int64_t(sizeof(T)) * most(forward.size, backward.size) + kBytes;
  }

  Scratch(void* memory, int64_t D, bool gradients) {
    base = reinterpret_cast<T*>(round_up(reinterpret_cast<int64_t>(memory), kBytes));
    const int64_t panel = 2 * kPanel<T> * D, arrays = gradients ? 2 : 1;
    chunk = most(1, least(64, (512 << 10) / (arrays * panel * int64_t(sizeof(T)))));
    panels = take(chunk * panel);
    c = take(chunk * kPanel<T>);
    steep = take(chunk);
    grads = take(gradients ? chunk * panel : 0);
    weights = take(chunk * kPanel<T>);
    dz = take(D * kRows * kWidth<T>);
    z = take(D * kRows);
    tiles = take(kBatch * kRows * kPanel<T>);
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

// Components [k, k + count) into panels, by squares of kWidth components and dimensions.  One that is absent, by a
// weight of -inf or as the padding of the last panel, is mu = 0, v = 1, c = -inf: whatever its parameters are, it
// reaches nothing.
template <class T>
Extremes<T> pack(const Mixture<T>& mix, int64_t k, int64_t count, const Scratch<T>& scratch) {
  constexpr int W = kWidth<T>;
  const int64_t D = mix.D;
  const double minus_infinity = -__builtin_inf(), uniform = -__builtin_log(double(mix.K));
  const Vec<T> limit = broadcast<T>(-Format<T>::kExpLimit);  // a finite v, so that u = 0 gives 0 and not NaN
  Extremes<T> extremes = {T(minus_infinity), T(0)};
  for (int64_t j = 0; j < round_up(count, kPanel<T>); j += W) {
    T* panel = scratch.panels + j / kPanel<T> * D * 2 * kPanel<T> + j % kPanel<T>;
    const Places<T> places(mix, k + j, count - j);
    double log_w[W];
    Vec<Bits<T>> absent;
    for (int i = 0; i < W; ++i) {
      log_w[i] = i >= places.count ? minus_infinity : mix.log_weights ? double(mix.log_weights[places.k[i]]) : uniform;
      absent[i] = log_w[i] == minus_infinity ? -1 : 0;
    }
    Vec<T> logvar_sum{}, narrow{};
    for (int64_t d = 0; d < D; d += W) {
      Vec<T> mu[W], logvar[W];
      places.load_transposed(mix.mu, d, D, mu);
      if (!mix.shared) places.load_transposed(mix.logvar, d, D, logvar);
      for (int i = 0; i < W && d + i < D; ++i) {
        T* p = panel + mix.place[d + i] * 2 * kPanel<T>;
        const Vec<T> lv = mix.shared ? broadcast<T>(mix.logvar[d + i]) : logvar[i];
        logvar_sum += lv;
        if (mix.widest) {
          const Vec<T> below_widest = mix.widest[d + i] - lv;
          narrow = below_widest > narrow ? below_widest : narrow;
        }
        const Vec<T> v = exponential<T>(-(lv < limit ? limit : lv)).exp * T(0.5);
        store<T>(p, absent ? broadcast<T>(T(1)) : v);
        store<T>(p + kPanel<T>, absent ? Vec<T>{} : mu[i]);
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

// What a may be and its term still be left out.  A sum of `reference` = l, or its largest a, does not see
// K terms that are `negligible` below it.  The gradient in z is a sum of r t s: there a term counts t s / s' times as
// much, s' the least s of any component in that dimension.  s / s' is what the panel's steepness is taken off for;
// t = sqrt(2 (c - a)) at most, and r t falls with a, so that t at the limit itself is taken for all below it: with A the
// room from there to c but for log t, t^2 = 2 (A + log t) < 3 A + 1.
template <class T>
T limit_for(T reference, T negligible, const Mixture<T>& mix, const Extremes<T>& chunk) {
  const T limit = reference - negligible;
  if (!mix.widest) return limit;
  const double t_squared = 3 * (double(chunk.c) - double(limit) + double(chunk.steep)) + 1;
  int64_t bits;
  __builtin_memcpy(&bits, &t_squared, sizeof bits);
  const int64_t exponent = (bits >> 52) - 1022;  // t^2 < 2^exponent, which is a cheap bound and near enough
  return T(double(limit) - (t_squared > 1 ? 0.5 * kLn2 * double(exponent) : 0.0));
}

// R rows of z, transposed: [D, R], the dimensions in their places.
template <class T, int R>
void transpose_rows(const T* z, int64_t D, const int32_t* place, T* out) {
  for (int64_t d = 0; d < D; ++d)
    for (int r = 0; r < R; ++r) out[place[d] * R + r] = z[r * D + d];
}

// The tiles of R rows with the panels of a chunk, a batch at a time: those that matter.
//
// A tile is left out if all its exponents are below their rows' limits.  As they only fall while the sum over dimensions
// grows, that may be known from the first dimensions already.  Where components are not in order and looking has been
// for nothing several times, most panels are summed without.  An exponent is the same number either way, and in forward and backward: far from all
// components a last bit of it can be worth many bits of exp(a - l).
template <class T, int R>
class Tiles {
 public:
  int count = 0;
  T* tile[kBatch];         // [R, kPanel]: the exponents; the caller may change them
  int64_t index[kBatch];   // of the panel in its chunk
  const T* panel[kBatch];  // [D, 2, kPanel]

  Tiles(const Scratch<T>& scratch, const Mixture<T>& mixture, const int64_t* exclude, int64_t first, int64_t panels)
      : scratch_(scratch), D_(mixture.D), in_order_(mixture.order), exclude_(exclude), first_(first), panels_(panels) {
    for (int i = 0; i < kBatch; ++i) tile[i] = scratch.tiles + i * R * kPanel<T>;
  }

  // The next batch; false at the end.
  bool find(const T (&limit)[R]) {
    for (count = 0; next_ < panels_ && count < kBatch; ++next_) {
      index[count] = next_;
      panel[count] = scratch_.panels + next_ * D_ * 2 * kPanel<T>;
      if (exponents(limit)) ++count;
    }
    return count > 0;
  }

 private:
  static constexpr int W = kWidth<T>, kPatience = 4, kEvery = 8;

  // The tile after the last one; false if it does not matter.
  bool exponents(const T (&limit)[R]) {
    const bool look = in_order_ || idle_ < kPatience || next_ % kEvery == 0;
    for (int64_t d = 0; d < D_; d += kBlock) {
      if (!subtract_squares(d, least(D_, d + kBlock), look, limit)) return false;
    }
    idle_ += look;
    if (exclude_) {
      for (int r = 0; r < R; ++r) {
        const int64_t lane = exclude_[r] - first_ - next_ * kPanel<T>;
        if (lane >= 0 && lane < kPanel<T>) tile[count][r * kPanel<T> + lane] = T(-__builtin_inf());
      }
    }
    return true;
  }

  // a = c, or a, minus the sum over dimensions [begin, end) of u^2 v / 2: the innermost loop.  False if that leaves no
  // exponent of the tile that matters.
  bool subtract_squares(int64_t begin, int64_t end, bool look, const T (&limit)[R]) {
    const T *z = scratch_.z, *from = begin ? tile[count] : scratch_.c + next_ * kPanel<T>;
    const int64_t stride = begin ? kPanel<T> : 0;
    Vec<T> sum[R][2] = {};
    for (int64_t d = begin, stop; d < end;) {
      for (stop = look ? least(end, d + (d < kLook ? kFirstLook : kLook)) : end; d < stop; ++d) {
        const T* p = panel[count] + d * 2 * kPanel<T>;
        const Vec<T> v0 = load<T>(p), v1 = load<T>(p + W), mu0 = load<T>(p + 2 * W), mu1 = load<T>(p + 3 * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> x = broadcast<T>(z[d * R + r]);
          const Vec<T> u0 = x - mu0, u1 = x - mu1;
          sum[r][0] = fma<T>(u0 * u0, v0, sum[r][0]);
          sum[r][1] = fma<T>(u1 * u1, v1, sum[r][1]);
        }
      }
      if (!look && end < D_) continue;
      bool matters = false;  // mostly row 0 has an exponent that is not below the limit, or is NaN; or none has
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if (matters) continue;
        const T lowered = limit[r] - scratch_.steep[next_];
        const Mask<T> m = below(load<T>(from + r * stride) - sum[r][0], lowered, kEveryLane<T>);
        matters = !every_lane<T>(below(load<T>(from + r * stride + W) - sum[r][1], lowered, m));
      }
      if (!matters) {
        idle_ = d < D_ ? 0 : idle_ + look;
        return false;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* a = tile[count] + r * kPanel<T>;
      store<T>(a, load<T>(from + r * stride) - sum[r][0]);
      store<T>(a + W, load<T>(from + r * stride + W) - sum[r][1]);
    }
    return true;
  }

  const Scratch<T>& scratch_;
  const int64_t D_;
  const bool in_order_;
  const int64_t* exclude_;
  const int64_t first_, panels_;
  int64_t next_ = 0, idle_ = 0;
};

// The second pass over a tile, with its weights w: dz[d][r] += w u v / 2 by lane; for the panel, dmu[d] += sum_r w u and
// dlogvar[d] += sum_r w u^2.
template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void tile_gradients(const T* z, const T* panel, int64_t D, const T* weights, T* dz, T* grads) {
  constexpr int W = kWidth<T>;
  Vec<T> w[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    w[r][0] = load<T>(weights + r * kPanel<T>);
    w[r][1] = load<T>(weights + r * kPanel<T> + W);
  }
  for (int64_t d = 0; d < D; ++d) {
    const T* p = panel + d * 2 * kPanel<T>;
    const Vec<T> v0 = load<T>(p), v1 = load<T>(p + W), mu0 = load<T>(p + 2 * W), mu1 = load<T>(p + 3 * W);
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

// row[d] += sign * the sum of the lanes of dz[place of d][r].
template <class T, int R>
void add_rows(const T* dz, int r, int64_t D, const int32_t* place, T sign, T* row) {
  constexpr int W = kWidth<T>;
  for (int64_t d = 0; d < D; d += W) {
    Vec<T> v[W] = {};
    for (int i = 0; i < W && d + i < D; ++i) v[i] = load<T>(dz + (place[d + i] * R + r) * W);
    store_up_to(row + d, load_up_to(row + d, D - d) + sign * sums<T>(v), D - d);
  }
}

// Where a row's top starts: the lowest number, not -inf, because -inf minus -inf is NaN.
template <class T>
constexpr T kLowest = sizeof(T) == 4 ? T(-__FLT_MAX__) : T(-__DBL_MAX__);

constexpr int kMargin = 4;  // how far a term may exceed top before top is raised

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

  Tiles<T, R> tiles(scratch, task.mixture, exclude, first, panels);
  bool any = false;
  while (tiles.find(limit)) {
    if (SCORE && !any) __builtin_memset(scratch.dz, 0, size_t(D) * R * kBytes);
    any = true;
    for (int r = 0; r < R; ++r) {
      Vec<T> largest = broadcast<T>(kLowest<T>);  // a NaN is not, but comes out of exp
      for (int i = 0; i < tiles.count; ++i) {
        const T* a = tiles.tile[i] + r * kPanel<T>;
        largest = larger<T>(load<T>(a), larger<T>(load<T>(a + kWidth<T>), largest));
      }
      if (__builtin_expect(!every_lane<T>(below(largest, top[r] + kMargin, kEveryLane<T>)), 0)) {
        raise_top<T, R, SCORE>(max<T>(largest), top + r, partial + r, total + r, scratch.dz + r * kWidth<T>,
                               score + r * D, D);
        if (!(top[r] < known[r])) limit[r] = limit_for<T>(top[r], negligible, task.mixture, extremes);
      }
      Vec<T> sum0{}, sum1{};
      for (int i = 0; i < tiles.count; ++i) {
        T* a = tiles.tile[i] + r * kPanel<T>;
        const Vec<T> e0 = exp_term<T>(load<T>(a) - top[r]), e1 = exp_term<T>(load<T>(a + kWidth<T>) - top[r]);
        sum0 += e0;
        sum1 += e1;
        if constexpr (SCORE) {
          store<T>(a, e0);
          store<T>(a + kWidth<T>, e1);
        }
      }
      total[r] += sum0 + sum1;
    }
    if constexpr (SCORE) {
      for (int i = 0; i < tiles.count; ++i)
        tile_gradients<T, R, true, false, false>(scratch.z, tiles.panel[i], D, tiles.tile[i], scratch.dz, nullptr);
    }
  }

  if (!any) return;
  for (int r = 0; r < R; ++r) {
    partial[r].top = top[r];
    partial[r].total += sum<T>(total[r]);
    if constexpr (SCORE) add_rows<T, R>(scratch.dz, r, D, task.mixture.place, T(2), score + r * D);
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
  const Scratch<T> scratch(task.scratch, D, false);
  for (int64_t r = 0; r < rows; ++r) task.partial[r] = {kLowest<T>, 0.0};
  if (task.score) __builtin_memset(task.score, 0, size_t(rows * D) * sizeof(T));

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = least(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    const Extremes<T> extremes = pack<T>(task.mixture, k, count, scratch);
    if (task.score)
      for_row_tiles<T, kRows>(0, rows, ForwardRows<T, true>{task, scratch, extremes, k, panels});
    else
      for_row_tiles<T, kRows>(0, rows, ForwardRows<T, false>{task, scratch, extremes, k, panels});
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

  Tiles<T, R> tiles(scratch, task.mixture, exclude, first, panels);
  bool any = false;
  while (tiles.find(limit)) {
    if (DZ && !any) __builtin_memset(scratch.dz, 0, size_t(D) * R * kBytes);
    any = true;
    for (int i = 0; i < tiles.count; ++i) {
      T *w = tiles.tile[i], *weights = scratch.weights + tiles.index[i] * kPanel<T>;
      for (int j = 0; j < kPanel<T>; j += kWidth<T>) {
        Vec<T> sum = load<T>(weights + j);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          T* a = w + r * kPanel<T> + j;
          const Vec<T> x = exp_term<T>(load<T>(a) - log_prob[r]) * grad[r];
          store<T>(a, x);
          sum += x;
        }
        store<T>(weights + j, sum);
      }
    }
    if constexpr (DZ || DMU || DLOGVAR) {
      for (int i = 0; i < tiles.count; ++i)
        tile_gradients<T, R, DZ, DMU, DLOGVAR>(scratch.z, tiles.panel[i], D, tiles.tile[i], scratch.dz,
                                               scratch.grads + tiles.index[i] * D * 2 * kPanel<T>);
    }
  }

  if (DZ && any) {
    for (int r = 0; r < R; ++r)
      add_rows<T, R>(scratch.dz, r, D, task.mixture.place, T(-2), task.dz + (row + r) * D);
  }
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

// The gradients of `count` packed components, from the k-th in order on, into the task's outputs.
template <class T>
void unpack_gradients(const Backward<T>& task, const Scratch<T>& scratch, int64_t k, int64_t count) {
  constexpr int W = kWidth<T>;
  const int64_t D = task.mixture.D;
  const int32_t* place = task.mixture.place;
  for (int64_t j = 0; j < count; j += W) {
    const int64_t at = j / kPanel<T> * D * 2 * kPanel<T> + j % kPanel<T>;
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
        const int64_t p = at + place[d + i] * 2 * kPanel<T>;
        const Vec<T> v = load<T>(scratch.panels + p) * T(2);
        if (task.dmu) dmu[i] = v * load<T>(scratch.grads + p);
        if (task.dlogvar) dlogvar[i] = T(0.5) * fma<T>(v, load<T>(scratch.grads + p + kPanel<T>), -weight);
        if (task.dlogvar && task.mixture.shared) task.dlogvar[d + i] += sum<T>(dlogvar[i]);
      }
      if (task.dmu) places.store_transposed(dmu, d, D, task.add, task.dmu);
      if (task.dlogvar && !task.mixture.shared) places.store_transposed(dlogvar, d, D, task.add, task.dlogvar);
    }
  }
}

template <class T, bool DZ, bool DMU, bool DLOGVAR>
void mixture_backward_as(const Backward<T>& task) {
  const int64_t D = task.mixture.D, rows = task.range.row_end - task.range.row_begin;
  const Scratch<T> scratch(task.scratch, D, true);

  const int64_t step = scratch.chunk * kPanel<T>;
  for (int64_t k = task.range.component_begin; k < task.range.component_end; k += step) {
    const int64_t count = least(step, task.range.component_end - k);
    const int64_t panels = (count + kPanel<T> - 1) / kPanel<T>;
    const Extremes<T> extremes = pack<T>(task.mixture, k, count, scratch);
    __builtin_memset(scratch.weights, 0, size_t(panels * kPanel<T>) * sizeof(T));
    if (DMU || DLOGVAR) __builtin_memset(scratch.grads, 0, size_t(panels * D * 2 * kPanel<T>) * sizeof(T));
    for_row_tiles<T, kRows>(0, rows, BackwardRows<T, DZ, DMU, DLOGVAR>{task, scratch, extremes, k, panels});
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
int64_t mixture_scratch(int64_t D) {
  return Scratch<T>::bytes(D);
}

}  // namespace FASTVAE_ISA
