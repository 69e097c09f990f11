// The mathematics of the CUDA kernels, for device and host alike: random numbers, exponentials, and the sum of
// logsumexp.
//
// The tests run these functions on the host, against fastvae/reference.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/compensated.h"
#include "../common/inline.h"

namespace fastvae::cuda {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLog2Pi = 1.83787706640934548356;
constexpr double kPi = 3.14159265358979323846;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kLowest = -3.402823466e38f;
  static constexpr float kExpLimit = 87.0f;  // |x| beyond which exp(x) leaves the normal numbers
  static constexpr int kTrigTerms = 4;
};
template <>
struct Limits<double> {
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr double kExpLimit = 708.0;
  static constexpr int kTrigTerms = 8;
};

// Philox4x32-10 of the counter (block, 0) under the key `seed` (Salmon et al., SC 2011).
FASTVAE_INLINE void philox(uint64_t seed, uint64_t block, uint32_t (&x)[4]) {
  x[0] = uint32_t(block);
  x[1] = uint32_t(block >> 32);
  x[2] = x[3] = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(x[0]) * 0xD2511F53u, p1 = uint64_t(x[2]) * 0xCD9E8D57u;
    x[0] = uint32_t(p1 >> 32) ^ x[1] ^ k0;
    x[1] = uint32_t(p1);
    x[2] = uint32_t(p0 >> 32) ^ x[3] ^ k1;
    x[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Box-Muller: two standard normal numbers, sqrt(-2 log u) times the cosine and the sine of the angle 2 pi w' 2^-32,
// where u = (w + 1/2) 2^-32.  log u is computed from the nearer end of (0, 1).  The angle's quadrant comes from the
// bits of w', so that the reduction of the angle is exact.
template <class T>
FASTVAE_INLINE void box_muller(uint32_t w, uint32_t angle, T& first, T& second) {
  constexpr T two_to_minus_32 = T(1.0 / 4294967296.0);
  const T log_u =
      w < 0x80000000u ? T(log((T(w) + T(0.5)) * two_to_minus_32)) : T(log1p((T(~w) + T(0.5)) * -two_to_minus_32));
  const T radius = T(sqrt(T(-2) * log_u));
  const uint32_t quadrant = (angle + (1u << 29)) >> 30;
  const T x = T(int32_t(angle << 2) >> 2) * T(2 * kPi) * two_to_minus_32;  // |x| <= pi / 4
  const T y = x * x;
  T cosine = T(1), sine = T(1);
  for (int i = Limits<T>::kTrigTerms; i >= 1; --i) {  // Taylor, by Horner
    cosine = T(fma(cosine, y * T(-1.0 / (2 * i * (2 * i - 1))), T(1)));
    sine = T(fma(sine, y * T(-1.0 / (2 * i * (2 * i + 1))), T(1)));
  }
  sine *= x;
  const T c = quadrant & 1 ? sine : cosine, s = quadrant & 1 ? cosine : sine;
  first = radius * ((quadrant + 1) & 2 ? -c : c);
  second = radius * (quadrant & 2 ? -s : s);
}

// The normal numbers 4 block to 4 block + 3 of the stream of `seed`: philox_normal in fastvae/reference.py.
template <class T>
FASTVAE_INLINE void philox_normals(uint64_t seed, uint64_t block, T (&out)[4]) {
  uint32_t word[4];
  philox(seed, block, word);
  box_muller(word[0], word[1], out[0], out[1]);
  box_muller(word[2], word[3], out[2], out[3]);
}

// The normal numbers `start` to start + 3, from one block or two.  All indices are constants, so that the numbers stay
// in registers.
template <class T>
FASTVAE_INLINE void normals_from(uint64_t seed, int64_t start, T (&out)[4]) {
  T n[4];
  philox_normals(seed, uint64_t(start) / 4, n);
  const int shift = int(start & 3);
  if (shift) {
    T next[4];
    philox_normals(seed, uint64_t(start) / 4 + 1, next);
    if (shift & 1) n[0] = n[1], n[1] = n[2], n[2] = n[3], n[3] = next[0], next[0] = next[1], next[1] = next[2];
    if (shift & 2) n[0] = n[2], n[1] = n[3], n[2] = next[0], n[3] = next[1];
  }
  for (int j = 0; j < 4; ++j) out[j] = n[j];
}

// 2^x for x <= 0 or a little above: a term of a sum whose largest term is about 1.  The relative error is at most 2^-22;
// a result below the normal numbers is 0.  A device has a unit for it.
FASTVAE_INLINE float exp2_term(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// exp(x), likewise; in float the error is larger by |x| 2^-24.
FASTVAE_INLINE float exp_term(float x) { return exp2_term(x * float(kLog2E)); }
FASTVAE_INLINE double exp_term(double x) { return exp(x); }

// logvar, but at least -kExpLimit, so that 1 / sigma^2 is finite.
template <class T>
FASTVAE_INLINE T bounded(T logvar) {
  return logvar < -Limits<T>::kExpLimit ? -Limits<T>::kExpLimit : logvar;
}

// x y, rounded.  Without this the compiler may make a multiply-add of the product and a sum that it goes into.  One
// kernel that does both would then have other bits than two kernels in turn.
FASTVAE_INLINE float rounded_product(float x, float y) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(x, y);
#else
  const volatile float product = x * y;
  return product;
#endif
}
FASTVAE_INLINE double rounded_product(double x, double y) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(x, y);
#else
  const volatile double product = x * y;
  return product;
#endif
}

// The sum of exp(x) over all x that were added, as total * exp(max), with max the largest x so far.  It starts at the
// lowest number and not at -inf, because -inf minus -inf is NaN.
template <class T>
struct LogSum {
  T max = Limits<T>::kLowest, total = 0;

  // Adds all that was added to `other`.
  FASTVAE_INLINE void merge(const LogSum& other) {
    const T higher = T(fmax(max, other.max));
    total = total * exp_term(max - higher) + other.total * exp_term(other.max - higher);
    max = higher;
  }

  // The logarithm of the sum; -inf where nothing was added.  If a single x was added it is x to the last bit: else a
  // responsibility exp(a - l) would be off by the last bit of a large l.
  FASTVAE_INLINE T log() const { return T(double(max) + ::log(double(total))); }
};

}  // namespace fastvae::cuda
