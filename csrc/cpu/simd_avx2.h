// AVX2 with FMA: what simd.h lists, with the instructions of this set.
#pragma once

#include <immintrin.h>

#include "simd_unmasked.h"

namespace FASTVAE_ISA {

constexpr int kRegisters = 16;
constexpr int kTableSteps = 3;

template <class T>
inline void stream(T* p, Vec<T> v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
}
inline void drain() { _mm_sfence(); }

template <class T>
inline bool every_lane(Mask<T> m) {
  return _mm256_movemask_epi8((__m256i)m) == -1;
}

inline Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
inline Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
}

inline Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}

inline Vec<uint32_t> look_up(const uint32_t (&table)[8], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm256_permutevar8x32_epi32((__m256i)load<uint32_t>(table), (__m256i)i);
}

}  // namespace FASTVAE_ISA
