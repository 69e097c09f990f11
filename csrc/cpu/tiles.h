// Tiles: the exponents a of R rows and the components of a panel, with the early checks.
//
// A tile is left out if all its exponents are below their rows' limits (../common/skipping.h); the others are active.
#pragma once

#include "../common/skipping.h"
#include "panels.h"

namespace FASTVAE_ISA {

using fastvae::Exponents;

// Dimensions are summed in registers a block at a time, which keeps the rounding error small.  Early checks of whether
// the tile can still be active come after kFirstCheck dimensions, after twice as many, then after every kCheckEvery.
constexpr int kBlock = 64, kFirstCheck = 4, kCheckEvery = 16;

// The limit of a row against a chunk: `log_negligible` is added to the reference, which is l or near it.  Each panel
// lowers the limit by its own log sigma ratio.
template <class T>
T limit_of(T reference, T log_negligible, const Mixture<T>& mix, const Chunk<T>& chunk) {
  const T limit = reference + log_negligible;
  if (!mix.max_logvar) return limit;
  return limit - fastvae::log_t_bound(limit, chunk.max_c, chunk.max_log_sigma_ratio);
}

// For exp_terms: the smallest x = a - reference of a term that is not left out.
template <class T>
T min_x(T limit, T reference) {
  const T x = limit - reference, min_of_exp_terms = -Format<T>::kExpLimit;
  return x > min_of_exp_terms ? x : min_of_exp_terms;
}

// The active tiles of R rows with the panels of a chunk, a batch at a time.
//
// Exponents only fall while the sum over dimensions grows, so that the first dimensions may show already that a tile is
// not active.  If components are not in order and several checks were fruitless, most panels are summed without checks.
// An exponent has the same bits with checks and without, in forward and in backward: far from all components, a last
// bit of an exponent is worth many bits of exp(a - l).
template <class T, int R>
class Tiles {
 public:
  int count = 0;          // of the batch
  int64_t panel[kBatch];  // of each tile, counted in the chunk
  // [R, kPanel]: the exponents of the i-th tile of the batch, which the caller may overwrite.
  T* tile(int i) const { return scratch_.tiles + i * R * kPanel<T>; }

  // Rows from m on.
  Tiles(const Scratch<T>& scratch, const Mixture<T>& mixture, const Chunk<T>& chunk, const int64_t* exclude, int64_t m,
        const Exponents<T>& kept)
      : scratch_(scratch),
        kept_(kept.a ? kept.a + m * kept.stride + chunk.first * R : nullptr),
        active_(kept.a ? kept.active + (m * kept.stride + chunk.first) / kPanel<T> : nullptr),
        D_(mixture.D),
        in_order_(mixture.order),
        isotropic_(mixture.isotropic),
        exclude_(exclude),
        first_(chunk.first),
        panels_(chunk.panels()) {}

  // The next batch, computed, and stored where exponents are kept; false at the end.
  bool find(const T (&limit)[R]) {
    for (count = 0; next_ < panels_ && count < kBatch; ++next_) {
      panel[count] = next_;
      const bool active = exponents(limit);
      if (kept_) {
        active_[next_] = active;
        if (active) __builtin_memcpy(kept_ + next_ * R * kPanel<T>, tile(count), R * kPanel<T> * sizeof(T));
      }
      count += active;
    }
    return count > 0;
  }

  // The next batch of the exponents that were kept.
  bool find_kept(const T (&limit)[R]) {
    for (count = 0; next_ < panels_ && count < kBatch; ++next_) {
      panel[count] = next_;
      if (!active_[next_]) continue;
      const T* a = kept_ + next_ * R * kPanel<T>;
      Mask<T> left_out = kEveryLane<T>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < kPanel<T>; i += W) {
          const Vec<T> exponent = load<T>(a + r * kPanel<T> + i);
          left_out = below(exponent, limit[r] - scratch_.log_sigma_ratio[next_], left_out);
          store<T>(tile(count) + r * kPanel<T> + i, exponent);
        }
      }
      count += !every_lane<T>(left_out);
    }
    return count > 0;
  }

 private:
  // After kMaxFruitless fruitless checks, one panel of kChecked is checked.
  static constexpr int W = kWidth<T>, S = R < kStrip ? R : kStrip, kMaxFruitless = 4, kChecked = 8;

  // The exponents of panel next_; false if the tile is not active.
  bool exponents(const T (&limit)[R]) {
    bool active = false;
    for (int row = 0; row < R; row += S) active |= strip(row, limit + row);
    if (active && exclude_) {
      for (int r = 0; r < R; ++r) {
        const int64_t lane = exclude_[r] - first_ - next_ * kPanel<T>;
        if (lane >= 0 && lane < kPanel<T>) tile(count)[r * kPanel<T> + lane] = T(-__builtin_inf());
      }
    }
    return active;
  }

  // S rows of the tile, from `row` on, with their limits; false if they are left out.  Their exponents are then -inf.
  bool strip(int row, const T* limit) {
    const bool check = in_order_ || fruitless_ < kMaxFruitless || next_ % kChecked == 0;
    T* a = tile(count) + row * kPanel<T>;
    bool active = isotropic_ ? subtract_squares<true, true>(row, 0, check, limit, a)
                             : subtract_squares<false, true>(row, 0, check, limit, a);
    for (int64_t d = kBlock; active && d < D_; d += kBlock)
      active = isotropic_ ? subtract_squares<true, false>(row, d, check, limit, a)
                          : subtract_squares<false, false>(row, d, check, limit, a);
    if (active)
      fruitless_ += check;
    else if constexpr (S < R)  // another strip may be active
      for (int i = 0; i < S * kPanel<T>; i += W) store<T>(a + i, broadcast<T>(T(-__builtin_inf())));
    return active;
  }

  // a = from - sum_d u^2 v / 2, over the dimensions of a block from `begin` on.  In the first block `from` is c, then
  // a.  False if the strip is left out.  A v that is the same in all dimensions is multiplied with once.
  template <bool kIsotropic, bool kFirst>
  FASTVAE_INLINE bool subtract_squares(int row, int64_t begin, bool check, const T* limit, T* a) {
    const T* v = scratch_.v + scratch_.v_at(next_);
    const T* from = kFirst ? scratch_.c + next_ * kPanel<T> : a;
    constexpr int64_t stride = kFirst ? 0 : kPanel<T>;
    const int64_t end = min(D_, begin + kBlock);
    const auto minus = [v](const T* from, Vec<T> sum) {
      return kIsotropic ? fma<T>(-sum, load<T>(v), load<T>(from)) : load<T>(from) - sum;
    };
    Vec<T> sum[S][2] = {};
    // Whether an exponent is not below its limit, or is NaN.  Row 0 is asked first: mostly it has one, or no row has.
    const auto active = [&] {
      const T log_sigma_ratio = scratch_.log_sigma_ratio[next_];
      Mask<T> m[2] = {kEveryLane<T>, kEveryLane<T>};
#pragma GCC unroll 8
      for (int r = 0; r < S; ++r) {
        for (int i = 0; i < 2; ++i)
          m[i] = below(minus(from + r * stride + i * W, sum[r][i]), limit[r] - log_sigma_ratio, m[i]);
        if (r == 0 && !every_lane<T>(m[0] & m[1])) return true;
      }
      return !every_lane<T>(m[0] & m[1]);
    };
    int64_t d = begin;
    if (kFirst && check && end >= 2 * kFirstCheck) {
      while (d < 2 * kFirstCheck) {
        add_squares<kIsotropic>(row, d, d + kFirstCheck, sum);  // a constant number of dimensions, unrolled
        d += kFirstCheck;
        if (!active()) return leave_out(d, check);
      }
    }
    while (d < end) {
      const int64_t stop = check ? min(end, d + kCheckEvery) : end;
      add_squares<kIsotropic>(row, d, stop, sum);
      d = stop;
      if ((check || end == D_) && !active()) return leave_out(d, check);
    }
#pragma GCC unroll 8
    for (int r = 0; r < S; ++r) {
      store<T>(a + r * kPanel<T>, minus(from + r * stride, sum[r][0]));
      store<T>(a + r * kPanel<T> + W, minus(from + r * stride + W, sum[r][1]));
    }
    return true;
  }

  // Leaves out a strip after d dimensions, and counts whether the check was fruitless: it saved no dimension.
  bool leave_out(int64_t d, bool check) {
    fruitless_ = d < D_ ? 0 : fruitless_ + check;
    return false;
  }

  // The innermost loop: sum += u^2 v / 2 over dimensions [begin, end).
  template <bool kIsotropic>
  FASTVAE_INLINE void add_squares(int row, int64_t begin, int64_t end, Vec<T> (&sum)[S][2]) const {
    const T *z = scratch_.z + row, *mu = scratch_.mu + scratch_.at(next_), *v = scratch_.v + scratch_.v_at(next_);
    for (int64_t d = begin; d < end; ++d) {
      const Vec<T> v0 = load<T>(v + d * kPanel<T>), v1 = load<T>(v + d * kPanel<T> + W);
      const Vec<T> mu0 = load<T>(mu + d * kPanel<T>), mu1 = load<T>(mu + d * kPanel<T> + W);
#pragma GCC unroll 8
      for (int r = 0; r < S; ++r) {
        const Vec<T> x = broadcast<T>(z[d * R + r]);
        const Vec<T> u0 = x - mu0, u1 = x - mu1, squares0 = u0 * u0, squares1 = u1 * u1;
        sum[r][0] = kIsotropic ? fma<T>(u0, u0, sum[r][0]) : fma<T>(squares0, v0, sum[r][0]);
        sum[r][1] = kIsotropic ? fma<T>(u1, u1, sum[r][1]) : fma<T>(squares1, v1, sum[r][1]);
      }
    }
  }

  const Scratch<T>& scratch_;
  T* const kept_;
  uint8_t* const active_;
  const int64_t D_;
  const bool in_order_, isotropic_;
  const int64_t* exclude_;
  const int64_t first_, panels_;
  int64_t next_ = 0, fruitless_ = 0;
};

}  // namespace FASTVAE_ISA
