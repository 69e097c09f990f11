// Which pairs of a row and a component the kernels leave out: the rule, for the CPU and CUDA alike.
// kernels/skipping.py is the same rule for Triton; docs/concepts/skipping.md explains it.
//
// Of a pair, a = log(w_k N(z_m; mu_k, sigma_k)) is the exponent, c the largest a that the component has anywhere (at
// its mean), r = exp(a - l) the responsibility, and t = (z_d - mu_kd) / sigma_kd in any one dimension d.  A pair is
// left out where a is below the limit of its row.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "inline.h"

namespace fastvae {

// Binary digits of a number of type T, the leading one included: 24, or 53.
template <class T>
constexpr int kDigits = sizeof(T) == 4 ? 24 : 53;

// Forward compares with the largest terms that it has seen so far and not with l: two binary digits more to spare.
constexpr int kForwardDigits = 2;

// In logsumexp and in the gradients of the parameters a pair counts r.  K pairs of r below 2^-digits / K are together
// less than a rounding of a row's total responsibility, which is 1.  The limit is l plus this:
template <class T>
FASTVAE_INLINE T log_negligible(int64_t K, int extra_digits = 0) {
  return T(-log(double(K)) - (kDigits<T> + extra_digits) * 0.693147180559945309417);
}

// In the gradient in z a pair counts r t / sigma.  Let sigma' be the largest sigma of any component in that dimension.
// Beside that component, the pair counts for t sigma' / sigma times its responsibility.  So the limit is lowered by the
// component's log sigma ratio, which is the largest log(sigma' / sigma) over the dimensions, and by log t.  This is a
// bound on log t, for components whose largest c and largest log sigma ratio are given:
//
// As c - a is a sum of t^2 / 2 over dimensions, t^2 <= 2 (c - a).  r t falls as a falls (where t > 1), so that t at the
// lowered limit bounds what is left out below it.  There c - a = A + log t, with A = c - limit + log sigma ratio, and
// t^2 = 2 (A + log t) < 3 A + 1.  The power of two above 3 A + 1 is a cheap bound that is near enough.
// All is computed in T: a GPU needs the bound once for each row of a tile, and many are slow in double precision.
template <class T>
FASTVAE_INLINE T log_t_bound(T limit, T largest_c, T largest_log_sigma_ratio) {
  const T t_squared = T(3) * (largest_c - limit + largest_log_sigma_ratio) + T(1);
  if (!(t_squared > T(1))) return T(0);
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Bits bits;
  memcpy(&bits, &t_squared, sizeof bits);
  const int exponent = int(bits >> (kDigits<T> - 1)) - (sizeof(T) == 4 ? 126 : 1022);  // t_squared < 2^exponent
  return T(0.5 * 0.693147180559945309417) * T(exponent);
}

}  // namespace fastvae
