// Random normal numbers.  Philox4x32-10 makes random words of 32 bits; u and u' in [0, 1) are such words divided by
// 2^32.  Box-Muller makes two normal numbers of them:
//
//   radius cos(2 pi u'),   radius sin(2 pi u'),   radius = sqrt(-2 log u)
#pragma once

#include "exp.h"

namespace FASTVAE_ISA {

constexpr double kPi = 3.14159265358979323846;
constexpr double kTwoToMinus32 = 1.0 / 4294967296.0;

// Terms of the series of log, and of cos and sin.
template <class T>
constexpr int kLogTerms = sizeof(T) == 4 ? 5 : 12;
template <class T>
constexpr int kTrigTerms = sizeof(T) == 4 ? 4 : 8;

// sqrt(-2 log u) with u = (w + 1/2) 2^-32.  Where u > 1/2, 1 - u is computed from the complement of w, with all its
// digits.
template <class T>
FASTVAE_INLINE void normal_radius(const Vec<Bits<T>> (&w)[2], Vec<T> (&radius)[2]) {
  using F = Format<T>;
  using I = Bits<T>;
  constexpr int kAbove = 8 * int(sizeof(I)) - 32;  // bits of a lane above the word
  const Vec<I> root_half = (Vec<I>)broadcast<T>(T(0.70710678118654752440));
  Vec<T> t[2], u[2], f[2], s[2], z[2], p[2];
  Vec<I> upper[2], e[2];
  side_by_side(upper, [&](int i) { return w[i] << kAbove >> (kAbove + 31); });  // all bits where u > 1/2
  // t is u or 1 - u, whichever is smaller
  side_by_side(t, [&](int i) {
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
  p[0] = p[1] = broadcast<T>(T(1.0 / (2 * kLogTerms<T> + 1)));
#pragma GCC unroll 16
  for (int k = kLogTerms<T> - 1; k >= 0; --k)
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

// cos and sin of 2 pi w 2^-32.  Quadrant and remainder come from the bits of w, so that the reduction is exact.
template <class T>
FASTVAE_INLINE Direction<T> normal_direction(const Vec<Bits<T>> (&w)[2]) {
  using I = Bits<T>;
  constexpr int above = 8 * int(sizeof(I)) - 30;
  Vec<T> x[2], z[2], c[2], s[2];
  side_by_side(x, [&](int i) {
    return __builtin_convertvector((w[i] << above) >> above, Vec<T>) * T(2 * kPi * kTwoToMinus32);  // |x| <= pi/4
  });
  side_by_side(z, [&](int i) { return x[i] * x[i]; });
  constexpr int n = 2 * kTrigTerms<T>;  // Taylor
  c[0] = c[1] = broadcast<T>(T(1 / factorial(n)));
  s[0] = s[1] = broadcast<T>(T(1 / factorial(n + 1)));
#pragma GCC unroll 16
  for (int k = n - 2; k >= 0; k -= 2) {
    const T sign = (n - k) % 4 == 0 ? 1 : -1;  // relative to the last coefficient's: signs alternate
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
constexpr int kNormals = 4 * kBlocks;      // normal numbers that they give

// The four words of kBlocks blocks: a word of each block in the low half of its lane.  The high half does not count.
struct Words {
  Vec<uint64_t> x[4];
};

// The words of N times kBlocks blocks, from `block` on.  Each round of a block waits for the one before it, so that N
// groups take their rounds in turn.
template <int N>
FASTVAE_INLINE void philox(uint64_t seed, Vec<uint64_t> block, Words* w) {
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

// Stores two vectors lane by lane in turn: a0 b0 a1 b1 ...
template <class T, size_t... I>
inline void store_in_turn(Vec<T> a, Vec<T> b, T* out, std::index_sequence<I...>) {
  constexpr int W = kWidth<T>;
  store<T>(out, __builtin_shufflevector(a, b, int(I % 2 * W + I / 2)...));
  store<T>(out + W, __builtin_shufflevector(a, b, int(I % 2 * W + I / 2 + W / 2)...));
}

// Box-Muller: the words of two groups of blocks become normal numbers, in the order of the blocks.
template <class T>
FASTVAE_INLINE void normals(const Words* w, T* out) {
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
    for (int i = 0; i < 2; ++i) store_in_turn<T>(radius[i] * d.cos[i], radius[i] * d.sin[i], out + i * kNormals, lanes);
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

// Normal numbers 4 b ... 4 b + groups * kNormals - 1 of the stream of `seed`, in order.  philox_normal in
// fastvae/reference.py defines the stream.  Philox and Box-Muller are two loops, each of which keeps the core busy with
// several groups at a time.
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
