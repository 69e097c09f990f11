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
  if (fma(allowed_slope(mix.D), exponent, features.rows.bounds[m].shift) > component.allowed) *features.uncertain = 1;
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

}  // namespace fastvae::cuda
