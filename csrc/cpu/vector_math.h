// exp, and Philox normal numbers, on vectors; to about one unit in the last place.
#pragma once

#include "simd.h"

namespace FASTVAE_ISA {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;
constexpr double kPi = 3.14159265358979323846;
constexpr double kTwoToMinus32 = 1.0 / 4294967296.0;

// v[i] = f(i) for both, the one beside the other in the order of instructions: a core's scheduler is small beside the
// chain of an exponential, and finds in one chain after the other too little to do.
template <class V, class F>
inline __attribute__((always_inline)) void side_by_side(V (&v)[2], const F& f) {
  v[0] = f(0), v[1] = f(1);
#if defined(__x86_64__) && !defined(FASTVAE_EMULATED)
  asm("" : "+v"(v[0]), "+v"(v[1]));
#endif
}

template <class T>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  static constexpr float kExpLimit = 87.0f;     // |x| beyond which exp(x) leaves the normal numbers
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the sum is ln 2; n * high is exact
  static constexpr int kExpTerms = 7, kLogTerms = 5, kTrigTerms = 4;
};
template <>
struct Format<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLimit = 708.0;
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kExpTerms = 13, kLogTerms = 12, kTrigTerms = 8;
};

// How terms are raised: 2^(j / 2^kSteps) from a table in registers, and 2^(r / 2^kSteps), r in [-1/2, 1/2], by a
// polynomial, minimax in relative error by Remez exchange.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
#if FASTVAE_BYTES == 64
  static constexpr int kSteps = 5, kDegree = 2;
  static constexpr float c[] = {1.0f, 0.021661166555f, 0.000234596189f};  // 5e-8
#elif FASTVAE_BYTES == 32
  static constexpr int kSteps = 3, kDegree = 3;
  static constexpr float c[] = {1.0f, 0.08664340178f, 0.003754025465f, 1.083910586e-4f};  // 3e-8
#else
  static constexpr int kSteps = 0, kDegree = 6;
  static constexpr float c[] = {1.0f, 0.6931472057f, 0.2402264689f, 0.05550328777f,
                                0.009618488957f, 0.001339993121f, 0.0001534581216f};  // 2e-9
#endif
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

#if FASTVAE_BYTES >= 32
// 2^(j / 2^kSteps), less the j that the exponent's shift puts into the mantissa.
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
#endif

// 2^(n / 2^kSteps) for n in the low bits of y; without steps for n less the exponent's bias.
template <int kSteps, class T>
inline Vec<T> exp2_of_low_bits(Vec<T> y) {
  const auto n = (Vec<Bits<T>>)y << (Format<T>::kMantissaBits - kSteps);
#if FASTVAE_BYTES >= 32
  if constexpr (kSteps > 0) return (Vec<T>)((Vec<uint32_t>)n + look_up(kExp2Table<kSteps>.bits, (Vec<uint32_t>)y));
#endif
  return (Vec<T>)n;
}

// exp(x) is the product of p and power, which is exactly zero at 2^-kBias.
template <class T>
inline __attribute__((always_inline)) void exp_factors(const Vec<T> (&x)[2], Vec<T> (&p)[2], Vec<T> (&power)[2]) {
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

// x becomes exp(x), for x <= 0 or a little above it: terms of a sum whose largest is about 1.  0 below `least`, which
// is not below -kExpLimit; NaN stays NaN.  Relative error below 2.5e-7 + |x| 2^-25; the absolute one, for x <= 0, 2e-7.
template <class T>
inline __attribute__((always_inline)) void exp_terms(Vec<T> (&x)[2], T least) {
  Vec<T> p[2], power[2];
  exp_factors<T>(x, p, power);
  for (int i = 0; i < 2; ++i) x[i] = x[i] < broadcast<T>(least) ? Vec<T>{} : p[i] * power[i];
}

// sum += exp(x), likewise; 0 where exp(x) leaves the normal numbers.  Without a comparison, which on some cores takes a
// multiplier.
template <class T>
inline __attribute__((always_inline)) void add_exp_terms(Vec<T> (&x)[2], Vec<T> (&sum)[2]) {
  Vec<T> p[2], power[2];
  for (Vec<T>& v : x) v = larger<T>(broadcast<T>(T(-kLn2 * Format<T>::kBias)), v);
  exp_factors<T>(x, p, power);
  for (int i = 0; i < 2; ++i) sum[i] = fma<T>(p[i], power[i], sum[i]);
}

constexpr double factorial(int n) { return n < 2 ? 1.0 : n * factorial(n - 1); }

template <class T>
struct Exponential {
  Vec<T> exp;                  // exp(x)
  Vec<T> exp_minus_1_minus_x;  // without cancellation where x is small
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
  Vec<T> series = broadcast<T>(T(1.0 / factorial(F::kExpTerms)));  // (e^r - 1 - r) / r^2, by Taylor: |r| < 0.35
  for (int i = F::kExpTerms - 1; i >= 2; --i) series = fma<T>(series, r, broadcast<T>(T(1.0 / factorial(i))));
  const Vec<T> q = series * (r * r);
  const Vec<T> value = fma<T>(scale, q + r, scale);
  const Vec<T> rest = fma<T>(scale, q, (scale - T(1)) + fma<T>(scale, r, -x));
  const Vec<T> infinity = broadcast<T>(T(__builtin_inf()));
  return {x > limit ? infinity : value, x > limit ? infinity : rest};
}

// x becomes exp(x), for |x| <= kExpLimit or NaN.
template <class T>
inline void exponentials_within(Vec<T> (&x)[2]) {
  for (Vec<T>& v : x) v = exponential<T>(v).exp;
}

#if FASTVAE_BYTES >= 32
// x = n ln 2 / W + t.
template <>
inline __attribute__((always_inline)) void exponentials_within<float>(Vec<float> (&x)[2]) {
  using F = Format<float>;
  constexpr int W = kWidth<float>, kSteps = W == 16 ? 4 : 3;
  // Of exp(t) for |t| <= ln 2 / 2 W, minimax in relative error: 3e-8 for 8 lanes, 2e-9 for 16.
  constexpr float c2 = W == 16 ? 0.5000162f : 0.5000648f, c3 = W == 16 ? 0.1666607f : 0.16664298f;
  const Vec<float> round = broadcast<float>(F::kRound), one = broadcast<float>(1.0f);
  Vec<float> y[2], n[2], t[2], p[2], power[2];
  side_by_side(y, [&](int i) { return fma<float>(x[i], broadcast<float>(float(kLog2E * W)), round); });
  side_by_side(n, [&](int i) { return y[i] - round; });
  side_by_side(t, [&](int i) { return fma<float>(n[i], broadcast<float>(-F::kLn2High / W), x[i]); });
  side_by_side(power, [&](int i) { return exp2_of_low_bits<kSteps, float>(y[i]); });
  side_by_side(t, [&](int i) { return fma<float>(n[i], broadcast<float>(-F::kLn2Low / W), t[i]); });
  side_by_side(p, [&](int i) { return fma<float>(broadcast<float>(c3), t[i], broadcast<float>(c2)); });
  side_by_side(p, [&](int i) { return fma<float>(p[i], t[i], one); });
  side_by_side(p, [&](int i) { return fma<float>(p[i], t[i], one); });
  for (int i = 0; i < 2; ++i) x[i] = p[i] * power[i];
}
#endif

template <class T>
inline Vec<T> clamp(Vec<T> x) {
  const Vec<T> limit = broadcast<T>(Format<T>::kExpLimit);
  return smaller<T>(limit, larger<T>(-limit, x));
}

// x becomes exp(x), for any x.
template <class T>
inline __attribute__((always_inline)) void exponentials(Vec<T> (&x)[2]) {
  Vec<T> within[2] = {clamp<T>(x[0]), clamp<T>(x[1])};
  exponentials_within<T>(within);
  for (int i = 0; i < 2; ++i)
    x[i] = x[i] > broadcast<T>(Format<T>::kExpLimit) ? broadcast<T>(T(__builtin_inf())) : within[i];
}

// sqrt(-2 log u), u = (w + 1/2) 2^-32.  Above 1/2, 1 - u is taken from the complement of w, which has all its digits.
template <class T>
inline __attribute__((always_inline)) void normal_radius(const Vec<Bits<T>> (&w)[2], Vec<T> (&radius)[2]) {
  using F = Format<T>;
  using I = Bits<T>;
  constexpr int kAbove = 8 * int(sizeof(I)) - 32;  // bits of a lane above the word
  const Vec<I> root_half = (Vec<I>)broadcast<T>(T(0.70710678118654752440));
  Vec<T> t[2], u[2], f[2], s[2], z[2], p[2];
  Vec<I> upper[2], e[2];
  side_by_side(upper, [&](int i) { return w[i] << kAbove >> (kAbove + 31); });  // all bits where u > 1/2
  side_by_side(t, [&](int i) {  // u or 1 - u, whichever is smaller
    return (__builtin_convertvector((w[i] ^ upper[i]) & I(0x7FFFFFFF), Vec<T>) + T(0.5)) * T(kTwoToMinus32);
  });
  side_by_side(u, [&](int i) { return upper[i] ? T(1) - t[i] : t[i]; });
  // u = m 2^e, m in [1 / sqrt 2, sqrt 2)
  side_by_side(e, [&](int i) { return ((Vec<I>)u[i] - root_half) >> F::kMantissaBits; });
  side_by_side(f, [&](int i) {
    const Vec<T> m = (Vec<T>)((Vec<I>)u[i] - (e[i] << F::kMantissaBits));
    return e[i] == 0 ? -t[i] : m - T(1);
  });
  side_by_side(s, [&](int i) { return f[i] / (T(2) + f[i]); });  // log m = 2 artanh(s), |s| < 0.172
  side_by_side(z, [&](int i) { return s[i] * s[i]; });
  p[0] = p[1] = broadcast<T>(T(1.0 / (2 * F::kLogTerms + 1)));
#pragma GCC unroll 16
  for (int k = F::kLogTerms - 1; k >= 0; --k)
    side_by_side(p, [&](int i) { return fma<T>(p[i], z[i], broadcast<T>(T(1.0 / (2 * k + 1)))); });
  side_by_side(radius, [&](int i) {
    const Vec<T> log_u = fma<T>(__builtin_convertvector(e[i], Vec<T>), broadcast<T>(T(kLn2)), T(2) * s[i] * p[i]);
    return square_root(T(-2) * log_u);
  });
}

template <class T>
struct Direction {
  Vec<T> cos[2], sin[2];
};

// cos and sin of 2 pi w 2^-32.  Quadrant and remainder come from the bits of w, so the reduction is exact.
template <class T>
inline __attribute__((always_inline)) Direction<T> normal_direction(const Vec<Bits<T>> (&w)[2]) {
  using I = Bits<T>;
  constexpr int above = 8 * int(sizeof(I)) - 30;
  Vec<T> x[2], z[2], c[2], s[2];
  side_by_side(x, [&](int i) {
    return __builtin_convertvector((w[i] << above) >> above, Vec<T>) * T(2 * kPi * kTwoToMinus32);  // |x| <= pi/4
  });
  side_by_side(z, [&](int i) { return x[i] * x[i]; });
  constexpr int n = 2 * Format<T>::kTrigTerms;  // Taylor
  c[0] = c[1] = broadcast<T>(T(1 / factorial(n)));
  s[0] = s[1] = broadcast<T>(T(1 / factorial(n + 1)));
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; k -= 2) {
    const T sign = (n - k) % 4 == 0 ? 1 : -1;  // of this coefficient to the last: sums alternate
    side_by_side(c, [&](int i) { return fma<T>(c[i], z[i], broadcast<T>(T(sign / factorial(k)))); });
    side_by_side(s, [&](int i) { return fma<T>(s[i], z[i], broadcast<T>(T(sign / factorial(k + 1)))); });
  }
  Direction<T> d;
  for (int i = 0; i < 2; ++i) {
    s[i] = s[i] * x[i];
    const Vec<I> quadrant = (w[i] + I(1 << 29)) << (8 * sizeof(I) - 32);  // its two bits on top
    const Vec<I> odd = quadrant << 1, sign = (Vec<I>)broadcast<T>(T(-0.0));
    const Vec<T> cos = odd < 0 ? s[i] : c[i], sin = odd < 0 ? c[i] : s[i];
    d.cos[i] = (Vec<T>)((Vec<I>)cos ^ ((quadrant ^ odd) & sign));
    d.sin[i] = (Vec<T>)((Vec<I>)sin ^ (quadrant & sign));
  }
  return d;
}

constexpr int kBlocks = kWidth<uint64_t>;  // Philox blocks computed together
constexpr int kNormals = 4 * kBlocks;      // and the numbers that they give

// A word of 32 bits of each block, in the low half of its lane; what is above does not count.
struct Words {
  Vec<uint64_t> x[4];
};

// Of N times kBlocks blocks, from `block` on, in turn: each step waits for the one before it.
template <int N>
inline __attribute__((always_inline)) void philox(uint64_t seed, Vec<uint64_t> block, Words* w) {
  using U = Vec<uint64_t>;
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const U b = block + uint64_t(n * kBlocks);
    w[n] = {{b, b >> 32, U{}, U{}}};
  }
  U k0 = U{} + (seed & 0xFFFFFFFF), k1 = U{} + (seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      U(&x)[4] = w[n].x;
      const U p0 = multiply_low(x[0], U{} + uint64_t(0xD2511F53));
      const U p1 = multiply_low(x[2], U{} + uint64_t(0xCD9E8D57));
      x[0] = (p1 >> 32) ^ (x[1] ^ k0);
      x[1] = p1;
      x[2] = (p0 >> 32) ^ (x[3] ^ k1);
      x[3] = p0;
    }
    k0 += uint64_t(0x9E3779B9);
    k1 += uint64_t(0xBB67AE85);
  }
}

// Two vectors, lane by lane in turn: a0 b0 a1 b1 ...
template <class T, size_t... I>
inline void store_in_turn(Vec<T> a, Vec<T> b, T* out, std::index_sequence<I...>) {
  constexpr int W = kWidth<T>;
  store<T>(out, __builtin_shufflevector(a, b, int(I % 2 * W + I / 2)...));
  store<T>(out + W, __builtin_shufflevector(a, b, int(I % 2 * W + I / 2 + W / 2)...));
}

// Box-Muller, of two groups of blocks to numbers in the order of their blocks.
template <class T>
inline __attribute__((always_inline)) void normals(const Words* w, T* out) {
  const uint64_t low = 0xFFFFFFFF;
  if constexpr (sizeof(T) == 4) {  // words 0 and 2 of a block side by side, and 1 and 3
    constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
    Vec<int32_t> even[2], odd[2];
    for (int i = 0; i < 2; ++i) {
      even[i] = (Vec<int32_t>)((w[i].x[0] & low) | (w[i].x[2] << 32));
      odd[i] = (Vec<int32_t>)((w[i].x[1] & low) | (w[i].x[3] << 32));
    }
    Vec<T> radius[2];
    normal_radius<T>(even, radius);
    const Direction<T> d = normal_direction<T>(odd);
    for (int i = 0; i < 2; ++i)
      store_in_turn<T>(radius[i] * d.cos[i], radius[i] * d.sin[i], out + i * kNormals, lanes);
  } else {
    for (int group = 0; group < 2; ++group) {
      const auto& x = w[group].x;
      const Vec<int64_t> even[2] = {(Vec<int64_t>)(x[0] & low), (Vec<int64_t>)(x[2] & low)};
      const Vec<int64_t> odd[2] = {(Vec<int64_t>)(x[1] & low), (Vec<int64_t>)(x[3] & low)};
      Vec<T> radius[2];
      normal_radius<T>(even, radius);
      const Direction<T> d = normal_direction<T>(odd);
      for (int i = 0; i < kWidth<T>; ++i) {
        for (int pair = 0; pair < 2; ++pair) {
          out[group * kNormals + 4 * i + 2 * pair] = radius[pair][i] * d.cos[pair][i];
          out[group * kNormals + 4 * i + 2 * pair + 1] = radius[pair][i] * d.sin[pair][i];
        }
      }
    }
  }
}

// Normal numbers 4 b ... 4 b + groups * kNormals - 1 of the stream of `seed`, in order; the definition is
// fastvae/reference.py, philox_normal.  In two loops, each of which keeps the core busy with several groups at a time.
template <class T, int groups>
inline void philox_normals(uint64_t seed, uint64_t b, T* out) {
  Vec<uint64_t> block;
  for (int i = 0; i < kBlocks; ++i) block[i] = b + uint64_t(i);
  static_assert(groups % 4 == 0);
  Words words[groups];
  for (int i = 0; i < groups; i += 4) philox<4>(seed, block + uint64_t(i * kBlocks), words + i);
  for (int i = 0; i < groups; i += 2) normals<T>(words + i, out + i * kNormals);
}

}  // namespace FASTVAE_ISA
