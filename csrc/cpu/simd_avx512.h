// AVX-512: what simd.h lists, with the instructions of this set.
#pragma once

#include <immintrin.h>

#include "simd_types.h"

namespace FASTVAE_ISA {

constexpr int kRegisters = 32;
constexpr int kTableSteps = 5;

template <class T>
inline void stream(T* p, Vec<T> v) {
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
}
inline void drain() { _mm_sfence(); }

inline Vec<float> load_up_to(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1), p);
}
inline Vec<double> load_up_to(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(n >= 8 ? __mmask8(0xff) : __mmask8((1u << n) - 1), p);
}
inline void store_up_to(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1), (__m512)v);
}
inline void store_up_to(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, n >= 8 ? __mmask8(0xff) : __mmask8((1u << n) - 1), (__m512d)v);
}

// A bit for each lane.
template <class T>
using Mask = uint32_t;
template <class T>
constexpr Mask<T> kEveryLane = 0xffffffffu >> (32 - kWidth<T>);
inline uint32_t below(Vec<float> v, float limit, uint32_t among) {
  return _mm512_mask_cmp_ps_mask(__mmask16(among), (__m512)v, _mm512_set1_ps(limit), _CMP_LT_OQ);
}
inline uint32_t below(Vec<double> v, double limit, uint32_t among) {
  return _mm512_mask_cmp_pd_mask(__mmask8(among), (__m512d)v, _mm512_set1_pd(limit), _CMP_LT_OQ);
}
template <class T>
inline bool every_lane(Mask<T> m) {
  return m == kEveryLane<T>;
}

// Here and below, masked forms with a full mask: GCC 12 warns of an undefined operand within the plain forms.
inline Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
inline Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }

template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
}

inline Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
}

// A table of one register, and one of two.
inline Vec<uint32_t> look_up(const uint32_t (&table)[16], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)i, (__m512i)load<uint32_t>(table));
}
inline Vec<uint32_t> look_up(const uint32_t (&table)[32], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm512_permutex2var_epi32((__m512i)load<uint32_t>(table), (__m512i)i,
                                                  (__m512i)load<uint32_t>(table + 16));
}

}  // namespace FASTVAE_ISA
