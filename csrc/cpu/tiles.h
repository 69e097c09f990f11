// Tiles: R rows by a panel, the exponents a of their pairs, and what their weights add to the gradients.
#pragma once

#include "panels.h"

namespace FASTVAE_ISA {

// Dimensions are summed in registers a block at a time, which keeps the rounding error small, with looks at whether the
// tile still matters: after the first few dimensions, after as many more, and then after every kLook.
constexpr int kBlock = 64, kFirstLook = 4, kLook = 16;

// What a may be and its term still be left out.  The sum, whose logarithm or largest a is `reference`, does not see K
// terms that are `negligible` below it.  The gradient in z is a sum of r t s: there a term counts t s / s' times as
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

// The least x of which exp_terms are not zero, for x = a - reference, where a may be left out below the limit.
template <class T>
T least_term(T limit, T reference) {
  const T least = limit - reference, most = -Format<T>::kExpLimit;
  return least > most ? least : most;
}

// The tiles of R rows with the panels of a chunk, a batch at a time: those that matter.
//
// A tile is left out if all its exponents are below their rows' limits.  As they only fall while the sum over dimensions
// grows, that may be known from the first dimensions already.  Where components are not in order and looking has been
// for nothing several times, most panels are summed without.  An exponent is the same number either way, in forward and
// in backward: far from all components a last bit of it is worth many bits of exp(a - l).
template <class T, int R>
class Tiles {
 public:
  int count = 0;
  int64_t index[kBatch];  // of the panel in its chunk
  // [R, kPanel]: the exponents of the i-th tile of the batch, for the caller to use up.
  T* tile(int i) const { return scratch_.tiles + i * R * kPanel<T>; }

  // From row m and component `first` on.
  Tiles(const Scratch<T>& scratch, const Mixture<T>& mixture, const int64_t* exclude, int64_t m, int64_t first,
        int64_t panels, const Exponents<T>& kept)
      : scratch_(scratch),
        kept_(kept.a ? kept.a + m * kept.stride + first * R : nullptr),
        matter_(kept.a ? kept.matter + (m * kept.stride + first) / kPanel<T> : nullptr),
        D_(mixture.D),
        in_order_(mixture.order),
        isotropic_(mixture.isotropic),
        exclude_(exclude),
        first_(first),
        panels_(panels) {}

  // The next batch; false at the end.  What is to be kept is.
  bool find(const T (&limit)[R]) {
    for (count = 0; next_ < panels_ && count < kBatch; ++next_) {
      index[count] = next_;
      const bool matter = exponents(limit);
      if (kept_) {
        matter_[next_] = matter;
        if (matter) __builtin_memcpy(kept_ + next_ * R * kPanel<T>, tile(count), R * kPanel<T> * sizeof(T));
      }
      count += matter;
    }
    return count > 0;
  }

  // The next batch of what was kept.
  bool find_kept(const T (&limit)[R]) {
    for (count = 0; next_ < panels_ && count < kBatch; ++next_) {
      index[count] = next_;
      if (!matter_[next_]) continue;
      const T* a = kept_ + next_ * R * kPanel<T>;
      Mask<T> m = kEveryLane<T>;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        for (int i = 0; i < kPanel<T>; i += W) {
          const Vec<T> exponent = load<T>(a + r * kPanel<T> + i);
          m = below(exponent, limit[r] - scratch_.steep[next_], m);
          store<T>(tile(count) + r * kPanel<T> + i, exponent);
        }
      }
      count += !every_lane<T>(m);
    }
    return count > 0;
  }

 private:
  static constexpr int W = kWidth<T>, S = R < kStrip ? R : kStrip, kPatience = 4, kEvery = 8;

  // The tile after the last one; false if it does not matter.
  bool exponents(const T (&limit)[R]) {
    bool any = false;
    for (int row = 0; row < R; row += S) any |= strip(row, limit + row);
    if (any && exclude_) {
      for (int r = 0; r < R; ++r) {
        const int64_t lane = exclude_[r] - first_ - next_ * kPanel<T>;
        if (lane >= 0 && lane < kPanel<T>) tile(count)[r * kPanel<T> + lane] = T(-__builtin_inf());
      }
    }
    return any;
  }

  // S rows of it, from `row` on, with their limits; false if none of their exponents matters, which are -inf then.
  bool strip(int row, const T* limit) {
    const bool look = in_order_ || idle_ < kPatience || next_ % kEvery == 0;
    T* a = tile(count) + row * kPanel<T>;
    bool matter = isotropic_ ? subtract_squares<true, true>(row, 0, look, limit, a)
                             : subtract_squares<false, true>(row, 0, look, limit, a);
    for (int64_t d = kBlock; matter && d < D_; d += kBlock)
      matter = isotropic_ ? subtract_squares<true, false>(row, d, look, limit, a)
                          : subtract_squares<false, false>(row, d, look, limit, a);
    if (matter) idle_ += look;
    else if constexpr (S < R)  // another strip may matter
      for (int i = 0; i < S * kPanel<T>; i += W) store<T>(a + i, broadcast<T>(T(-__builtin_inf())));
    return matter;
  }

  // a = c in the first block, else a, minus the sum over the dimensions of the block from `begin` on of u^2 v / 2.  False
  // if that leaves no exponent of the strip that matters.  A v that is the same everywhere is multiplied with once.
  template <bool kIsotropic, bool kFirst>
  inline __attribute__((always_inline)) bool subtract_squares(int row, int64_t begin, bool look, const T* limit, T* a) {
    const T* v = scratch_.v + scratch_.v_at(next_);
    const T* from = kFirst ? scratch_.c + next_ * kPanel<T> : a;
    constexpr int64_t stride = kFirst ? 0 : kPanel<T>;
    const int64_t end = min(D_, begin + kBlock);
    const auto minus = [v](const T* from, Vec<T> sum) {
      return kIsotropic ? fma<T>(-sum, load<T>(v), load<T>(from)) : load<T>(from) - sum;
    };
    Vec<T> sum[S][2] = {};
    // Whether an exponent is not below its limit, or is NaN: mostly one of row 0 is, or none is.
    const auto matters = [&] {
      const T steep = scratch_.steep[next_];
      Mask<T> m[2] = {kEveryLane<T>, kEveryLane<T>};
#pragma GCC unroll 8
      for (int r = 0; r < S; ++r) {
        for (int i = 0; i < 2; ++i)
          m[i] = below(minus(from + r * stride + i * W, sum[r][i]), limit[r] - steep, m[i]);
        if (r == 0 && !every_lane<T>(m[0] & m[1])) return true;
      }
      return !every_lane<T>(m[0] & m[1]);
    };
    int64_t d = begin;
    if (kFirst && look && end >= 2 * kFirstLook) {
      while (d < 2 * kFirstLook) {
        add_squares<kIsotropic>(row, d, d + kFirstLook, sum);  // a constant number of dimensions, unrolled
        d += kFirstLook;
        if (!matters()) return leave_out(d, look);
      }
    }
    while (d < end) {
      const int64_t stop = look ? min(end, d + kLook) : end;
      add_squares<kIsotropic>(row, d, stop, sum);
      d = stop;
      if ((look || end == D_) && !matters()) return leave_out(d, look);
    }
#pragma GCC unroll 8
    for (int r = 0; r < S; ++r) {
      store<T>(a + r * kPanel<T>, minus(from + r * stride, sum[r][0]));
      store<T>(a + r * kPanel<T> + W, minus(from + r * stride + W, sum[r][1]));
    }
    return true;
  }

  // A strip does not matter, which is known after d dimensions: whether it was worth looking.
  bool leave_out(int64_t d, bool look) {
    idle_ = d < D_ ? 0 : idle_ + look;
    return false;
  }

  // The innermost loop: sum += u^2 v / 2 over dimensions [begin, end).
  template <bool kIsotropic>
  inline __attribute__((always_inline)) void add_squares(int row, int64_t begin, int64_t end, Vec<T> (&sum)[S][2]) const {
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
  uint8_t* const matter_;
  const int64_t D_;
  const bool in_order_, isotropic_;
  const int64_t* exclude_;
  const int64_t first_, panels_;
  int64_t next_ = 0, idle_ = 0;
};

// The second pass over a tile, with its weights w: dz[d][r] += w u v / 2 by lane; for the panel, dmu[d] += sum_r w u and
// dlogvar[d] += sum_r w u^2.
template <class T, int R, bool DZ, bool DMU, bool DLOGVAR>
void tile_gradients(const Scratch<T>& scratch, int64_t index, int64_t D, const T* weights) {
  constexpr int W = kWidth<T>;
  const T *z = scratch.z, *mu = scratch.mu + scratch.at(index), *v = scratch.v + scratch.v_at(index);
  T *dz = scratch.dz, *grads = scratch.grads + 2 * scratch.at(index);
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

}  // namespace FASTVAE_ISA
