// The baseline: what simd.h lists, in plain C++, or with SSE2 where C++ cannot say it.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "simd_unmasked.h"

namespace FASTVAE_ISA {

#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kTableSteps = 0;

#if defined(__SSE2__)

template <class T>
inline void stream(T* p, Vec<T> v) {
  _mm_stream_si128((__m128i*)p, (__m128i)v);
}
inline void drain() { _mm_sfence(); }

template <class T>
inline bool every_lane(Mask<T> m) {
  return _mm_movemask_epi8((__m128i)m) == 0xffff;
}

inline Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
}

#else

template <class T>
inline void stream(T* p, Vec<T> v) {
  store<T>(p, v);
}
inline void drain() {}

template <class T>
inline bool every_lane(Mask<T> m) {
  Bits<T> all = -1;
  for (int i = 0; i < kWidth<T>; ++i) all &= m[i];
  return all != 0;
}

inline Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }

#endif

inline Vec<float> square_root(Vec<float> v) {
  for (int i = 0; i < kWidth<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline Vec<double> square_root(Vec<double> v) {
  for (int i = 0; i < kWidth<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

}  // namespace FASTVAE_ISA
