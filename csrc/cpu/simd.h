// Vectors of one instruction set: the compiler's vector extensions, and the few things they cannot say.
//
// This file and those that include it are compiled once for each instruction set, in a namespace of its own
// (isa_*.cpp).  They must not instantiate anything of the standard library: the linker would keep one copy of it,
// possibly the one that needs AVX-512, for all.  Types, such as index sequences, are no code.
#pragma once

#include <stddef.h>

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace FASTVAE_ISA {

// FASTVAE_BYTES, the width of a vector, tells the instruction set: 64 AVX-512, 32 AVX2 with FMA, 16 the baseline.
constexpr int kBytes = FASTVAE_BYTES;

// Rows of a tile, and of a strip of it, whose sums stay in registers: 8 x 2 where there are 32 registers, 4 x 2 of 16.
constexpr int kRows = 8;
#if FASTVAE_BYTES == 64 || defined(__aarch64__)
constexpr int kStrip = 8;
#else
constexpr int kStrip = 4;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<int64_t> {
  typedef int64_t type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<uint64_t> {
  typedef uint64_t type __attribute__((vector_size(kBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kWidth = kBytes / int(sizeof(T));

// The integers that hold the bits of a floating number.
template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // minus, not plus: -0.0 stays
}

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, kBytes);
}

// Stores past the caches, where the machine can: what it overwrites is not read first.  p is a multiple of kBytes, and
// other threads may read after drain().
template <class T>
inline void stream(T* p, Vec<T> v) {
#if FASTVAE_BYTES == 64
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif FASTVAE_BYTES == 32
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  store<T>(p, v);
#endif
}
inline void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first n lanes, at most all; load puts zeros after them.
#if FASTVAE_BYTES == 64
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
#else
template <class T>
inline Vec<T> load_up_to(const T* p, int64_t n) {
  if (n >= kWidth<T>) return load<T>(p);
  Vec<T> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class T>
inline void store_up_to(T* p, Vec<T> v, int64_t n) {
  if (n >= kWidth<T>) return store<T>(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif

// The first n lanes, zeros after them.
template <class T>
inline Vec<T> keep(Vec<T> v, int64_t n) {
  if (n < kWidth<T>) {
    for (int i = n > 0 ? int(n) : 0; i < kWidth<T>; ++i) v[i] = 0;
  }
  return v;
}

// Contracted to one instruction where the machine has it.
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}

// Which lanes pass a test.  below: those of `so_far` whose value is below the limit; a NaN never is.
#if FASTVAE_BYTES == 64
template <class T>
using Mask = uint32_t;
template <class T>
constexpr Mask<T> kEveryLane = (1u << kWidth<T>) - 1;
inline uint32_t below(Vec<float> v, float limit, uint32_t so_far) {
  return _mm512_mask_cmp_ps_mask(__mmask16(so_far), (__m512)v, _mm512_set1_ps(limit), _CMP_LT_OQ);
}
inline uint32_t below(Vec<double> v, double limit, uint32_t so_far) {
  return _mm512_mask_cmp_pd_mask(__mmask8(so_far), (__m512d)v, _mm512_set1_pd(limit), _CMP_LT_OQ);
}
template <class T>
inline bool every_lane(Mask<T> m) {
  return m == kEveryLane<T>;
}
#else
template <class T>
using Mask = Vec<Bits<T>>;
template <class T>
constexpr Mask<T> kEveryLane = ~Mask<T>{};
template <class T>
inline Mask<T> below(Vec<T> v, T limit, Mask<T> so_far) {
  return (v < broadcast<T>(limit)) & so_far;
}
template <class T>
inline bool every_lane(Mask<T> m) {
#if FASTVAE_BYTES == 32
  return _mm256_movemask_epi8((__m256i)m) == -1;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)m) == 0xffff;
#else
  Bits<T> all = -1;
  for (int i = 0; i < kWidth<T>; ++i) all &= m[i];
  return all != 0;
#endif
}
#endif

#if FASTVAE_BYTES == 64
// Masked forms with a full mask: GCC 12 warns of the undefined operand that the plain ones are made with.
inline Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
inline Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }
#elif FASTVAE_BYTES == 32
inline Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
inline Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
#else
inline Vec<float> square_root(Vec<float> v) {
  for (int i = 0; i < kWidth<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline Vec<double> square_root(Vec<double> v) {
  for (int i = 0; i < kWidth<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif

// The larger and the smaller of each lane; b where either is NaN.
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
#if FASTVAE_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  else return (Vec<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif FASTVAE_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
#if FASTVAE_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
  else return (Vec<T>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif FASTVAE_BYTES == 32
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
  else return (Vec<T>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// table[i % N] for each lane i, from a table that fills a register, or two.
#if FASTVAE_BYTES == 64
inline Vec<uint32_t> look_up(const uint32_t (&table)[16], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)i, (__m512i)load<uint32_t>(table));
}
inline Vec<uint32_t> look_up(const uint32_t (&table)[32], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm512_permutex2var_epi32((__m512i)load<uint32_t>(table), (__m512i)i,
                                                 (__m512i)load<uint32_t>(table + 16));
}
#elif FASTVAE_BYTES == 32
inline Vec<uint32_t> look_up(const uint32_t (&table)[8], Vec<uint32_t> i) {
  return (Vec<uint32_t>)_mm256_permutevar8x32_epi32((__m256i)load<uint32_t>(table), (__m256i)i);
}
#endif

// The product of the low 32 bits of each 64-bit lane, whatever the high ones hold.
inline Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
#if FASTVAE_BYTES == 64
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif FASTVAE_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Blocks of S lanes of a and b, interleaved: the even blocks of both, or the odd ones.
template <class T, int S, size_t... I>
inline Vec<T> even_blocks(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I - S : I)...);
}
template <class T, int S, size_t... I>
inline Vec<T> odd_blocks(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I : I + S)...);
}

// The lanes of a where their blocks of S are even, and of b where they are odd.
template <class T, int S, size_t... I>
inline Vec<T> blocks_in_turn(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I : I)...);
}
template <class T, int S, size_t... I>
inline Vec<T> swap_blocks(Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I ^ S)...);
}

// Lane i becomes the sum of the lanes of v[i]; v is used up.
template <class T, int S = 1>
inline __attribute__((always_inline)) Vec<T> sums(Vec<T>* v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
#pragma GCC unroll 8
  for (int i = 0; i < kWidth<T> / 2 / S; ++i) {
    const Vec<T> a = v[2 * i], b = v[2 * i + 1];  // taking turns is cheaper than moving lanes, which is done once
    v[i] = blocks_in_turn<T, S>(a, b, lanes) + swap_blocks<T, S>(blocks_in_turn<T, S>(b, a, lanes), lanes);
  }
  if constexpr (2 * S < kWidth<T>) return sums<T, 2 * S>(v);
  return v[0];
}

// The sum of the lanes.
template <class T, int S = kWidth<T> / 2>
inline T sum(Vec<T> v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
  if constexpr (S == 0) return v[0];
  else return sum<T, S / 2>(v + odd_blocks<T, S>(v, v, lanes));
}

// The largest lane.
template <class T, int S = kWidth<T> / 2>
inline T max(Vec<T> v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
  if constexpr (S == 0) return v[0];
  else {
    const Vec<T> other = odd_blocks<T, S>(v, v, lanes);
    return max<T, S / 2>(v > other ? v : other);
  }
}

// The square v[row][lane], transposed in place.
template <class T, int S = 1>
inline __attribute__((always_inline)) void transpose(Vec<T> (&v)[kWidth<T>]) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i & S) continue;
    const Vec<T> a = v[i], b = v[i + S];
    v[i] = even_blocks<T, S>(a, b, lanes);
    v[i + S] = odd_blocks<T, S>(a, b, lanes);
  }
  if constexpr (2 * S < kWidth<T>) transpose<T, 2 * S>(v);
}

}  // namespace FASTVAE_ISA
