// The mathematics of the CUDA kernels, for device and host alike: random numbers, exponentials, and the sum of
// logsumexp.
//
// The tests run these functions on the host, against fastvae/reference.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/compensated.h"
#include "../common/inline.h"

namespace fastvae::cuda {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLog2 = 0.69314718055994530942;
constexpr double kLog2Pi = 1.83787706640934548356;
constexpr double kPi = 3.14159265358979323846;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kLowest = -3.402823466e38f;
  static constexpr float kExpLimit = 87.0f;  // |x| beyond which exp(x) leaves the normal numbers
  static constexpr int kTrigDegree = 4;
};
template <>
struct Limits<double> {
  static constexpr double kLowest = -1.7976931348623157e308;
  static constexpr double kExpLimit = 708.0;
  static constexpr int kTrigDegree = 8;
};

FASTVAE_INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
FASTVAE_INLINE float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <int n>
constexpr double kFactorial = n * kFactorial<n - 1>;
template <>
inline constexpr double kFactorial<0> = 1.0;

// 1 / k! - y / (k + 2)! + y^2 / (k + 4)! - ..., to the power `degree` of y; minus_y is -y.
template <int k, int degree, class T>
FASTVAE_INLINE T alternating_series(T minus_y) {
  constexpr T first = T(1 / kFactorial<k>);
  if constexpr (degree == 0)
    return first;
  else
    return T(fma(minus_y, alternating_series<k + 2, degree - 1>(minus_y), first));
}

// The upper half of the product of two words.  Of the product in 64 bits, nvcc makes an addition of 0 as well.
FASTVAE_INLINE uint32_t high_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __umulhi(a, b);
#else
  return uint32_t(uint64_t(a) * b >> 32);
#endif
}

// Philox4x32-10 of the counter (block, 0) under the key `seed` (Salmon et al., SC 2011).
FASTVAE_INLINE void philox(uint64_t seed, uint64_t block, uint32_t (&x)[4]) {
  x[0] = uint32_t(block);
  x[1] = uint32_t(block >> 32);
  x[2] = x[3] = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t a = x[0], b = x[2];
    x[0] = high_product(b, 0xCD9E8D57u) ^ x[1] ^ k0;
    x[1] = b * 0xCD9E8D57u;
    x[2] = high_product(a, 0xD2511F53u) ^ x[3] ^ k1;
    x[3] = a * 0xD2511F53u;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// log u with u = (w + 1/2) 2^-32, to half a unit of the last digit of u or of 1 - u, whichever is smaller.
FASTVAE_INLINE double log_uniform(uint32_t w, double) {
  constexpr double two_to_minus_32 = 1.0 / 4294967296.0;
  return w < 0x80000000u ? log((w + 0.5) * two_to_minus_32) : log1p((double(~w) + 0.5) * -two_to_minus_32);
}

// In float32 all lanes of a warp take the same instructions.  u is base + x, where base is 0 or 1 and x has all its
// digits, and it is 2^e (1 + f) with f in [-1/4, 1/2).  There log(1 + f) is f + f^2 q(f), by a minimax polynomial that
// moves sqrt(-2 log u) by less than 1e-8.
FASTVAE_INLINE float log_uniform(uint32_t w, float) {
  const float x = (float(int32_t(w)) + 0.5f) * float(1.0 / 4294967296.0), base = x < 0 ? 1.0f : 0.0f;
  const int32_t e = (bits_of(base + x) - bits_of(0.75f)) & int32_t(0xFF800000);  // times 2^23
  const float scale = float_of(bits_of(1.0f) - e);                               // 2^-e
  const float f = fma(x, scale, fma(base, scale, -1.0f));
  float q = 0.053024374f;
  q = fma(q, f, -0.120265f);
  q = fma(q, f, 0.15030731f);
  q = fma(q, f, -0.16841416f);
  q = fma(q, f, 0.19973497f);
  q = fma(q, f, -0.24992041f);
  q = fma(q, f, 0.33333638f);
  q = fma(q, f, -0.50000083f);
  return fma(float(e), float(kLog2 / 8388608), fma(f * f, q, f));
}

// The square root of x, a normal number above 0, in float32 without the branch for those that are not.
FASTVAE_INLINE double positive_sqrt(double x) { return sqrt(x); }
FASTVAE_INLINE float positive_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
#else
  return std::sqrt(x);
#endif
}

// Box-Muller: two standard normal numbers, sqrt(-2 log u) times the cosine and the sine of the angle 2 pi w' 2^-32,
// where u = (w + 1/2) 2^-32.  The angle's quadrant comes from the bits of w', so that the reduction of the angle is
// exact.
template <class T>
FASTVAE_INLINE void box_muller(uint32_t w, uint32_t angle, T& first, T& second) {
  const T radius = positive_sqrt(T(-2) * log_uniform(w, T()));
  const uint32_t quadrant = (angle + (1u << 29)) >> 30;
  const T x = T(int32_t(angle << 2) >> 2) * T(2 * kPi / 4294967296.0);  // |x| <= pi / 4
  const T minus_y = -x * x, cosine = alternating_series<0, Limits<T>::kTrigDegree>(minus_y),
          sine = x * alternating_series<1, Limits<T>::kTrigDegree>(minus_y);
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

// The normal numbers `start` to start + 3, from one block or two; with kAligned, start is a multiple of four.  All
// indices are constants, so that the numbers stay in registers.
template <bool kAligned, class T>
FASTVAE_INLINE void normals_from(uint64_t seed, int64_t start, T (&out)[4]) {
  philox_normals(seed, uint64_t(start) / 4, out);
  const int shift = int(start & 3);
  if (kAligned || !shift) return;
  T next[4];
  philox_normals(seed, uint64_t(start) / 4 + 1, next);
  if (shift & 1)
    out[0] = out[1], out[1] = out[2], out[2] = out[3], out[3] = next[0], next[0] = next[1], next[1] = next[2];
  if (shift & 2) out[0] = out[2], out[1] = out[3], out[2] = next[0], out[3] = next[1];
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
