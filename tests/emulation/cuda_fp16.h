// CUDA's fp16 numbers: as much as the kernels use.  In plain C++, since not every g++ and not every machine has a type
// for them.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

// To the nearest, ties to even; 65520 and more becomes infinity.
inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  uint32_t half;
  if (!(magnitude < 65520.0f))
    half = magnitude != magnitude ? 0x7FFF : 0x7C00;
  else if (magnitude < 0x1p-14f)
    half = uint32_t(rintf(magnitude * 0x1p24f));  // a multiple of the least number; 1024 is the least normal one
  else {
    const uint32_t rebiased = (bits & 0x7FFFFFFF) - ((127 - 15) << 23);
    half = (rebiased + 0xFFF + (rebiased >> 13 & 1)) >> 13;  // 13 bits less, where half a unit carries
  }
  return {uint16_t(x != x ? half : half | sign)};
}

inline float __half2float(__half x) {
  const uint32_t half = x.bits & 0x7FFF, sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = half < 0x400    ? __float_as_uint(float(half) * 0x1p-24f)
                             : half < 0x7C00 ? (half << 13) + ((127 - 15) << 23)
                                             : half << 13 | 0x7F800000;
  return __uint_as_float(magnitude | sign);
}

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float2half2_rn(float x) { return __half2half2(__float2half_rn(x)); }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline float __low2float(__half2 x) { return __half2float(x.x); }
inline float __high2float(__half2 x) { return __half2float(x.y); }
inline float2 __half22float2(__half2 x) { return {__low2float(x), __high2float(x)}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
