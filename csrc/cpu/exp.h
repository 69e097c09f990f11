// exp on vectors, to about one unit in the last place: of any number, and faster for the terms of a sum.
//
// Most functions take two vectors at a time, see side_by_side.
#pragma once

#include "simd.h"

namespace FASTVAE_ISA {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// v[i] = f(i) for both vectors, with the instructions for one next to those for the other.  An exponential is a long
// chain of operations.  With one chain after the other, a core's scheduler would see too few operations that can start.
template <class V, class F>
FASTVAE_INLINE void side_by_side(V (&v)[2], const F& f) {
  v[0] = f(0), v[1] = f(1);
#if defined(__x86_64__) && !defined(FASTVAE_EMULATED)
  asm("" : "+v"(v[0]), "+v"(v[1]));
#endif
}

// What exp has to know of a floating-point format.
template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr float kExpLimit = 87.0f;     // |x| beyond which exp(x) leaves the normal numbers
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the sum is ln 2; n * high is exact
  static constexpr int kExpTerms = 7;
};
template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLimit = 708.0;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kExpTerms = 13;
};

// The two factors of exp(x) = 2^(j / 2^kSteps) 2^(r / 2^kSteps), r in [-1/2, 1/2].  The first comes from a table in
// registers of 2^kSteps numbers.  The second is a polynomial with coefficients c, minimax in relative error by Remez
// exchange: the larger the table, the shorter the polynomial.
template <int kSteps>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<5> {
  static constexpr int kDegree = 2;
  static constexpr float c[] = {1.0f, 0.021661166555f, 0.000234596189f};  // relative error 5e-8
};
template <>
struct Exp2Polynomial<3> {
  static constexpr int kDegree = 3;
  static constexpr float c[] = {1.0f, 0.08664340178f, 0.003754025465f, 1.083910586e-4f};  // 3e-8
};
template <>
struct Exp2Polynomial<0> {
  static constexpr int kDegree = 6;
  static constexpr float c[] = {
      1.0f, 0.6931472057f, 0.2402264689f, 0.05550328777f, 0.009618488957f, 0.001339993121f, 0.0001534581216f};  // 2e-9
};

template <class T>
struct Exp2;
template <>
struct Exp2<float> : Exp2Polynomial<kTableSteps> {
  static constexpr int kSteps = kTableSteps;
};
template <>
struct Exp2<double> {
  static constexpr int kSteps = 0, kDegree = 11;
  static constexpr double c[] = {1.0,
                                 0.69314718055994533046,
                                 0.24022650695910156205,
                                 0.055504108664819921483,
                                 0.0096181291075883350833,
                                 0.0013333558146789950323,
                                 0.00015403530462514613026,
                                 0.0000152527334899608046,
                                 1.3215433089594629037e-6,
                                 1.0178198033328527662e-7,
                                 7.0741056262456593708e-9,
                                 4.4352809446103361611e-10};  // 3e-18
};

// The bits of 2^(j / 2^kSteps), minus the j that the shift into the exponent (exp2_of_low_bits) puts into the mantissa.
template <int kSteps>
struct Exp2Table {
  uint32_t bits[1 << kSteps];
  constexpr Exp2Table() : bits() {
    constexpr uint32_t thirty_seconds[] = {
        0x3f800000, 0x3f82cd87, 0x3f85aac3, 0x3f88980f, 0x3f8b95c2, 0x3f8ea43a, 0x3f91c3d3, 0x3f94f4f0,
        0x3f9837f0, 0x3f9b8d3a, 0x3f9ef532, 0x3fa27043, 0x3fa5fed7, 0x3fa9a15b, 0x3fad583f, 0x3fb123f6,
        0x3fb504f3, 0x3fb8fbaf, 0x3fbd08a4, 0x3fc12c4d, 0x3fc5672a, 0x3fc9b9be, 0x3fce248c, 0x3fd2a81e,
        0x3fd744fd, 0x3fdbfbb8, 0x3fe0ccdf, 0x3fe5b907, 0x3feac0c7, 0x3fefe4ba, 0x3ff5257d, 0x3ffa83b3};
    for (int j = 0; j < 1 << kSteps; ++j)
      bits[j] = thirty_seconds[j << (5 - kSteps)] - (uint32_t(j) << (Format<float>::kMantissaBits - kSteps));
  }
};
template <int kSteps>
inline constexpr Exp2Table<kSteps> kExp2Table;

// 2^(n / 2^kSteps) for the integer n in the low bits of y.  Without a table, 2^(n - kBias).
template <int kSteps, class T>
inline Vec<T> exp2_of_low_bits(Vec<T> y) {
  const auto n = (Vec<Bits<T>>)y << (Format<T>::kMantissaBits - kSteps);
  if constexpr (kSteps > 0)
    return (Vec<T>)((Vec<uint32_t>)n + look_up(kExp2Table<kSteps>.bits, (Vec<uint32_t>)y));
  else
    return (Vec<T>)n;
}

// exp(x) is p * power.  The power is exactly zero where it would be 2^-kBias.
template <class T>
FASTVAE_INLINE void exp_factors(const Vec<T> (&x)[2], Vec<T> (&p)[2], Vec<T> (&power)[2]) {
  using F = Format<T>;
  using E = Exp2<T>;
  const Vec<T> scale = broadcast<T>(T(kLog2E * (1 << E::kSteps)));
  const Vec<T> round = broadcast<T>(F::kRound + (E::kSteps ? 0 : F::kBias));
  Vec<T> y[2], r[2];
  side_by_side(y, [&](int i) { return fma<T>(x[i], scale, round); });
  side_by_side(r, [&](int i) { return round - y[i]; });
  side_by_side(r, [&](int i) { return fma<T>(x[i], scale, r[i]); });
  side_by_side(power, [&](int i) { return exp2_of_low_bits<E::kSteps, T>(y[i]); });
  p[0] = p[1] = broadcast<T>(E::c[E::kDegree]);
#pragma GCC unroll 16
  for (int k = E::kDegree - 1; k >= 0; --k)
    side_by_side(p, [&](int i) { return fma<T>(p[i], r[i], broadcast<T>(E::c[k])); });
}

// x becomes exp(x), for x <= 0 or a little above it: terms of a sum whose largest is about 1.  A term with x below
// `min_x` becomes 0; min_x is not below -kExpLimit.  NaN stays NaN.  The relative error is below 2.5e-7 + |x| 2^-25;
// the absolute error, for x <= 0, below 2e-7.
template <class T>
FASTVAE_INLINE void exp_terms(Vec<T> (&x)[2], T min_x) {
  Vec<T> p[2], power[2];
  exp_factors<T>(x, p, power);
  for (int i = 0; i < 2; ++i) x[i] = x[i] < broadcast<T>(min_x) ? Vec<T>{} : p[i] * power[i];
}

// sum += exp(x), for the same x.  A term is 0 where exp(x) leaves the normal numbers.  There is no comparison, which
// takes a multiplier on some cores.
template <class T>
FASTVAE_INLINE void add_exp_terms(Vec<T> (&x)[2], Vec<T> (&sum)[2]) {
  Vec<T> p[2], power[2];
  for (Vec<T>& v : x) v = larger<T>(broadcast<T>(T(-kLn2 * Format<T>::kBias)), v);
  exp_factors<T>(x, p, power);
  for (int i = 0; i < 2; ++i) sum[i] = fma<T>(p[i], power[i], sum[i]);
}

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

template <class T>
struct Exponential {
  Vec<T> exp;                  // exp(x)
  Vec<T> exp_minus_1_minus_x;  // exp(x) - 1 - x, without cancellation where x is small
};

// For any x.  With x = n ln 2 + r and q = e^r - 1 - r:
// exp(x) = 2^n (1 + r + q),  exp(x) - 1 - x = 2^n q + (2^n - 1) + (2^n r - x).
template <class T>
inline Exponential<T> exponential(const Vec<T> x) {
  using F = Format<T>;
  const Vec<T> limit = broadcast<T>(F::kExpLimit);
  Vec<T> inside = x > limit ? limit : x;
  inside = inside < -limit ? -limit : inside;
  const Vec<T> y = fma<T>(inside, broadcast<T>(T(kLog2E)), broadcast<T>(F::kRound));
  const Vec<T> n = y - broadcast<T>(F::kRound);
  Vec<T> r = fma<T>(n, broadcast<T>(-F::kLn2High), inside);
  r = fma<T>(n, broadcast<T>(-F::kLn2Low), r);
  const Vec<T> scale = (Vec<T>)(((Vec<Bits<T>>)y + F::kBias) << F::kMantissaBits);
  // (e^r - 1 - r) / r^2 by its Taylor series, |r| < 0.35
  Vec<T> series = broadcast<T>(T(1.0 / factorial(F::kExpTerms)));
  for (int i = F::kExpTerms - 1; i >= 2; --i) series = fma<T>(series, r, broadcast<T>(T(1.0 / factorial(i))));
  const Vec<T> q = series * (r * r);
  const Vec<T> value = fma<T>(scale, q + r, scale);
  const Vec<T> rest = fma<T>(scale, q, (scale - T(1)) + fma<T>(scale, r, -x));
  const Vec<T> infinity = broadcast<T>(T(__builtin_inf()));
  return {x > limit ? infinity : value, x > limit ? infinity : rest};
}

// x becomes exp(x), for |x| <= kExpLimit or NaN.  With a table of W numbers, exp(x) = 2^(n / W) exp(t) where
// x = n ln 2 / W + t.
template <class T>
FASTVAE_INLINE void exponentials_within(Vec<T> (&x)[2]) {
  if constexpr (sizeof(T) == 4 && kTableSteps > 0) {
    using F = Format<T>;
    constexpr int W = kWidth<T>, kSteps = W == 16 ? 4 : 3;
    // exp(t) for |t| <= ln 2 / 2 W, minimax in relative error: 3e-8 for 8 lanes, 2e-9 for 16.
    constexpr T c2 = W == 16 ? 0.5000162f : 0.5000648f, c3 = W == 16 ? 0.1666607f : 0.16664298f;
    const Vec<T> round = broadcast<T>(F::kRound), one = broadcast<T>(1);
    Vec<T> y[2], n[2], t[2], p[2], power[2];
    side_by_side(y, [&](int i) { return fma<T>(x[i], broadcast<T>(T(kLog2E * W)), round); });
    side_by_side(n, [&](int i) { return y[i] - round; });
    side_by_side(t, [&](int i) { return fma<T>(n[i], broadcast<T>(-F::kLn2High / W), x[i]); });
    side_by_side(power, [&](int i) { return exp2_of_low_bits<kSteps, T>(y[i]); });
    side_by_side(t, [&](int i) { return fma<T>(n[i], broadcast<T>(-F::kLn2Low / W), t[i]); });
    side_by_side(p, [&](int i) { return fma<T>(broadcast<T>(c3), t[i], broadcast<T>(c2)); });
    side_by_side(p, [&](int i) { return fma<T>(p[i], t[i], one); });
    side_by_side(p, [&](int i) { return fma<T>(p[i], t[i], one); });
    for (int i = 0; i < 2; ++i) x[i] = p[i] * power[i];
  } else {
    for (Vec<T>& v : x) v = exponential<T>(v).exp;
  }
}

template <class T>
inline Vec<T> clamp(Vec<T> x) {
  const Vec<T> limit = broadcast<T>(Format<T>::kExpLimit);
  return smaller<T>(limit, larger<T>(-limit, x));
}

// x becomes exp(x), for any x.
template <class T>
FASTVAE_INLINE void exponentials(Vec<T> (&x)[2]) {
  Vec<T> within[2] = {clamp<T>(x[0]), clamp<T>(x[1])};
  exponentials_within<T>(within);
  for (int i = 0; i < 2; ++i)
    x[i] = x[i] > broadcast<T>(Format<T>::kExpLimit) ? broadcast<T>(T(__builtin_inf())) : within[i];
}

}  // namespace FASTVAE_ISA
