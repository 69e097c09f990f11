// When the product form is as exact as the difference form: a bound on its error, pair by pair.
//
// Let |.| be norms over features, of a row's x and a component's y as product.h scales them, u = 2^-24, and a_mk the
// exponent.  The error of the product form is at most e = kError u (|x1| |y1| + |x2| |y2|) + 2 u |R|, with 1 for the
// features of z' and 2 for those of its square:
//
// - hi + lo is off by 2^-22 of a feature, and lo lo is left out: 12 u sum |x_f y_f|, which is the worst case;
// - the tensor cores cut digits off the sums of 16 products, and the sums are rounded: as much again, in the worst of
//   10^5 pairs that were made to lose much, by sums that are cut off earlier than any device's
//   (tests/backends/test_cuda_certificate.py);
// - sum |x_f y_f| is at most |x1| |y1| + |x2| |y2| (Cauchy and Schwarz).
//
// The roundings of the difference form may move a by as much as
//
//   u (2 |t|^2 + (1 + sqrt D) (|log w| + 1/2 sum_d |logvar_d| + D/2 log 2 pi + 1/2 |t|^2))        |t|^2 = 2 (c - a)
//
// which is what the tests allow it (tests/budget.py).  A pair is certified where e is at most that.
//
// Of single pairs in the difference form, forward adds up a - R, whose rounding loses up to 2 u |R| as well.  Where a
// pair may not lose as much, the kernels for the difference form compute all.
#pragma once

#include "product.h"
#include "row.cuh"

namespace fastvae::cuda {

constexpr float kError = 24.0f, kRoundoff = 0x1p-24f;

// In units of log 2, 1e-4 nats: e is to be at most that as well.  Backward makes weights exp(a - l) in the difference form,
// whose sum differs from 1 by the error of l: in a far row, as much is allowed as a responsibility.
constexpr float kMaxError = 1.5e-4f;

// How what is allowed grows with c - a.
__device__ __forceinline__ float allowed_slope(int64_t D) { return kRoundoff * (5.0f + sqrtf(float(D))); }

// Of certified sums: whether the difference form has to compute all, because of a row or of too many pairs; or, for the
// parameters, because of upstream gradients of both signs.
__device__ __forceinline__ bool is_given_up(const Features& features, bool own_are_rows) {
  const volatile int *uncertain = features.uncertain, *signs = features.signs;
  return (*uncertain & kGivenUp) || (!own_are_rows && signs[0] && signs[1]);
}

// Of the pairs of a warp and 32 other items, how many may be computed in the difference form, on average: where they are
// more, the kernels for the difference form alone are as fast.
constexpr int kMaxUncertain = 32;
constexpr int kHeadStart = 8;  // at first all pairs count, because no larger exponent has been seen

// The exponent of a pair in the difference form, base 2 and without R.  Eight lanes compute it together, or have no pair.
// Sets features.uncertain where that is not exact enough.
__device__ __forceinline__ float exact_exponent(const Mixture<float>& mix, const Features& features, bool has_pair,
                                                int64_t m, int64_t k) {
  float squares = 0;
  if (has_pair) {
    const float *z = mix.z + m * mix.D, *mu = mix.mu + k * mix.D, *logvar = mix.logvar + (mix.shared ? 0 : k * mix.D);
#pragma unroll 4  // so many loads are on their way at a time
    for (int d = int(threadIdx.x) % 8; d < mix.D; d += 8) {
      const float t = (z[d] - mu[d]) * exp(-0.5f * bounded(logvar[d]));
      squares = fma(t, t, squares);
    }
  }
  squares = group_sum(squares, 8);
  if (!has_pair) return -INFINITY;
  const ItemBounds& component = features.components.bounds[k];
  const double less = 0.5 * double(squares) + double(features.row_term[m]);  // R may be large: it is rounded once
  const float exponent = float(double(component.shift) - less * kLog2E);
  if (fma(allowed_slope(mix.D), exponent, features.rows.bounds[m].shift) > component.allowed)
    *features.uncertain = kGivenUp;
  return exponent;
}

// Calls assign(exponent) in each of the `lanes` of a warp, with the exponent of the pair that the lane names by its row
// and component.  Four pairs are computed at a time.
template <class Assign>
__device__ __forceinline__ void for_each_uncertain(const Mixture<float>& mix, const Features& features, unsigned lanes,
                                                   int64_t row, int64_t component, const Assign& assign) {
  const int lane = int(threadIdx.x) % 32;
  while (lanes) {
    unsigned from_own = lanes;  // from the one on that this lane's eight compute
    for (int group = 0; group < lane / 8; ++group) from_own &= from_own - 1;
    const int source = from_own ? __ffs(int(from_own)) - 1 : lane;
    const int64_t m = __shfl_sync(0xFFFFFFFFu, int(row), source), k = __shfl_sync(0xFFFFFFFFu, int(component), source);
    const float exponent = exact_exponent(mix, features, from_own != 0 && m < mix.M && k < mix.K, m, k);
    const int rank = __popc(lanes & ((1u << lane) - 1));
    const float own = __shfl_sync(0xFFFFFFFFu, exponent, rank % 4 * 8);
    if ((lanes >> lane & 1) && rank < 4) assign(own);
    for (int taken = 0; taken < 4; ++taken) lanes &= lanes - 1;
  }
}

// The gradients of a component's mean and variance are made of sums over the rows, in one dimension of
//
//   S0 = sum w     S1 = sum w z'     S2 = sum w z'^2     sum w u = S1 - mu' S0     sum w u^2 = S2 - 2 mu' S1 + mu'^2 S0
//
// where much may cancel.  Weights of one sign are taken to be positive.  The sums are off by at most
//
//   e0 = kTotalError u S0
//   e1 = each sqrt(S0 S2) + floor S0      e2 = each S2 + (the squares' floor) S0
//   each = (kSumsError + sqrt(n / s) + sqrt s) u      floor = 2^-25 (the largest scale of a row) + (2^-11 M + 4) / S0
//
// - hi + lo, of a feature and of its weight, and lo lo: 12 u sum w |z'| as above, which is at most 12 u sqrt(S0 S2);
// - what tensor cores cut off of the products of 16 rows, as above: 12 u; z' and mu' are rounded: 4 u;
// - n additions of 32 rows, in s splits, and those of the splits: u times the roots of both, as in tests/budget.py.  Equal
//   rows, or components, in thousands of additions lose more: the difference form, with 32 times as many, loses the most;
// - floor: a small feature, or a weight, is off by 2^-25, and weights are left out that are together below 2^-26 of the
//   largest.  As the sums are made, a feature is below 2^14 and a weight at most that.
// - S0 is summed apart: 8 numbers, and then with compensation.
//
// The tests allow dmu and dlogvar, over 1 / sigma^2 and 1/2,
//
//   (what weights may be off) sum w |u|      + u (6 + sqrt M) sum w |u|
//   (what weights may be off) sum w |t^2 - 1| + u ((10 + sqrt M) sum w t^2 + (4 + sqrt M) sum w)
//
// and a weight may be off by the a of its pair and by l: by at least u (1 + sqrt D) (|log w| + D log 2 pi).  The sums may
// take half of that.  sum w |u| is at least |sum w u|, and at least sum w u^2 over the largest |u|.
//
// A row's score is made of sums over the components, with the responsibilities r as weights; in one dimension
//
//   S0 = sum r v     S1 = sum r v mu'     S2 = sum r v mu'^2     score = S1 - z' S0     sum r v u^2 = S2 - z' (S1 + score)
//
// S0 and S1 are off as the sums above are, and by kTotalError u of themselves, because they are divided by the sum of the
// weights.  S2 serves the bound alone: its features and weights are hi alone, so that it is off by kSpreadError S2 and its
// floor.  The tests allow the score
//
//   (what weights may be off) sum r v |u| + u (8 + sqrt K) sum r v |u|
constexpr float kSumsError = 28.0f, kTotalError = 12.0f, kSpreadError = 1.02f * 0x1p-10f;

// n: how many items were summed.  max_scale: the largest of their scales.  total: the sum of their weights.
__device__ __forceinline__ float floor_of(float n, float max_scale, float total) {
  return 0x1p-25f * max_scale + (0x1p-11f * n + 4.0f) / total;
}

struct SumsCertificate {
  float each, weights;  // as above; half of what weights may be off
  float root_others;    // sqrt M, or sqrt K

  // others: how many items are summed, `together` of them at a time.  log_weight: |log w|, or less.
  __device__ SumsCertificate(float others, float together, int splits, float D, float log_weight)
      : each(kRoundoff * (kSumsError + sqrtf(others / (together * float(splits)) + 1.0f) + sqrtf(float(splits)))),
        weights(kRoundoff * 0.5f * (1.0f + sqrtf(D)) * (log_weight + D * float(kLog2Pi))),
        root_others(sqrtf(others)) {}
};

// In one dimension.  size: the largest |z'| of a row.  with_variance: whether dlogvar is wanted.
__device__ __forceinline__ bool are_certified(const SumsCertificate& certificate, float s0, float s1, float s2,
                                              float mu, float v, float size, float floor, float square_floor,
                                              bool with_variance) {
  const float e0 = kTotalError * kRoundoff * s0, e2 = fma(certificate.each, s2, square_floor * s0);
  const float e1 = fma(certificate.each, sqrtf(s0 * (s2 + e2)), floor * s0);
  const float wu = s1 - mu * s0, wuu = s2 - mu * s1 - mu * wu;
  const float error = e1 + fabs(mu) * e0, square_error = e2 + fabs(mu) * (2.0f * e1 + fabs(mu) * e0);
  const float least_square = wuu - square_error;
  const float least = fmaxf(least_square / (size + fabs(mu)), fabs(wu) - error);
  if (!(error <= (certificate.weights + kRoundoff * (6.0f + certificate.root_others)) * least)) return false;
  if (!with_variance) return true;
  const float variance_error = v * square_error + e0;
  const float far = fmaxf(fabs(v * wuu - s0) - variance_error, 0.0f);
  return variance_error <=
         certificate.weights * far +
             kRoundoff * ((10.0f + certificate.root_others) * v * least_square + (4.0f + certificate.root_others) * s0);
}

// The sums of a row in one dimension, for responsibilities that add up to one.
struct ScoreSums {
  float s0, s1, s2, score;
  float floor0, floor1, floor2;
};

// z is z', and max_mean the largest |mu'| of a component.
__device__ __forceinline__ bool is_certified(const SumsCertificate& certificate, const ScoreSums& sums, float z,
                                             float max_mean) {
  const float e2 = fma(kSpreadError, sums.s2, sums.floor2), total = kTotalError * kRoundoff;
  const float e0 = fma(certificate.each + total, sums.s0, sums.floor0);
  const float e1 = fma(certificate.each, sqrtf((sums.s0 + e0) * (sums.s2 + e2)), sums.floor1) + total * fabs(sums.s1);
  const float error = e1 + fabs(z) * e0;
  const float least_square = sums.s2 - z * (sums.s1 + sums.score) - (e2 + fabs(z) * (e1 + error));
  const float least = fmaxf(least_square / (max_mean + fabs(z)), fabs(sums.score) - error);
  return error <= (certificate.weights + kRoundoff * (8.0f + certificate.root_others)) * least;
}

}  // namespace fastvae::cuda
