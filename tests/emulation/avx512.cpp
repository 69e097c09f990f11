// The AVX-512 kernels with loops for their intrinsics, and an instruction set that is always chosen.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

namespace {

template <class T>
using Wide __attribute__((vector_size(64))) = T;

template <class T>
constexpr int kLanes = 64 / sizeof(T);

template <class T, class F>
Wide<T> lanes(const F& f) {
  Wide<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = f(i);
  return v;
}

template <class T>
Wide<T> load_masked(uint32_t mask, const T* p) {
  return lanes<T>([&](int i) { return mask >> i & 1 ? p[i] : T(0); });
}

template <class T>
void store_masked(T* p, uint32_t mask, Wide<T> v) {
  for (int i = 0; i < kLanes<T>; ++i)
    if (mask >> i & 1) p[i] = v[i];
}

template <class T>
uint32_t less(uint32_t mask, Wide<T> a, Wide<T> b) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes<T>; ++i) result |= uint32_t((mask >> i & 1) && a[i] < b[i]) << i;
  return result;
}

template <class T>
Wide<T> larger_of(Wide<T> a, Wide<T> b) {
  return lanes<T>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}

template <class T>
Wide<T> smaller_of(Wide<T> a, Wide<T> b) {
  return lanes<T>([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}

Wide<uint32_t> looked_up(Wide<uint32_t> index, Wide<uint32_t> low, Wide<uint32_t> high) {
  return lanes<uint32_t>([&](int i) { return index[i] / 16 % 2 ? high[index[i] % 16] : low[index[i] % 16]; });
}

template <class T>
Wide<T> roots(Wide<T> v) {
  return lanes<T>([&](int i) { return std::sqrt(v[i]); });
}

}  // namespace

#undef _mm512_mask_cmp_ps_mask
#undef _mm512_mask_cmp_pd_mask
#define _mm512_maskz_loadu_ps(mask, p) load_masked<float>(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) load_masked<double>(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) store_masked<float>(p, mask, (Wide<float>)(v))
#define _mm512_mask_storeu_pd(p, mask, v) store_masked<double>(p, mask, (Wide<double>)(v))
#define _mm512_mask_cmp_ps_mask(mask, a, b, test) less<float>(mask, (Wide<float>)(a), b)
#define _mm512_mask_cmp_pd_mask(mask, a, b, test) less<double>(mask, (Wide<double>)(a), b)
#define _mm512_set1_ps(x) lanes<float>([&](int) { return x; })
#define _mm512_set1_pd(x) lanes<double>([&](int) { return x; })
#define _mm512_maskz_sqrt_ps(mask, v) roots<float>((Wide<float>)(v))
#define _mm512_maskz_sqrt_pd(mask, v) roots<double>((Wide<double>)(v))
#define _mm512_maskz_max_ps(mask, a, b) larger_of<float>((Wide<float>)(a), (Wide<float>)(b))
#define _mm512_maskz_max_pd(mask, a, b) larger_of<double>((Wide<double>)(a), (Wide<double>)(b))
#define _mm512_maskz_min_ps(mask, a, b) smaller_of<float>((Wide<float>)(a), (Wide<float>)(b))
#define _mm512_maskz_min_pd(mask, a, b) smaller_of<double>((Wide<double>)(a), (Wide<double>)(b))
#define _mm512_maskz_mul_epu32(mask, a, b) (((Wide<uint64_t>)(a) & 0xFFFFFFFFu) * ((Wide<uint64_t>)(b) & 0xFFFFFFFFu))
#define _mm512_maskz_permutexvar_epi32(mask, index, table) \
  looked_up((Wide<uint32_t>)(index), (Wide<uint32_t>)(table), (Wide<uint32_t>)(table))
#define _mm512_permutex2var_epi32(low, index, high) \
  looked_up((Wide<uint32_t>)(index), (Wide<uint32_t>)(low), (Wide<uint32_t>)(high))
#define _mm512_stream_si512(p, v) (*reinterpret_cast<Wide<int64_t>*>(p) = (Wide<int64_t>)(v))

#define FASTVAE_EMULATED  // there are no registers of this width
#define FASTVAE_ISA fastvae_emulated_avx512
#define FASTVAE_BYTES 64
#include "isa_table.h"

const fastvae::Isa& fastvae::isa() {
  static constexpr Isa table = {"avx512, emulated", fastvae_emulated_avx512::kKernels<float>,
                                fastvae_emulated_avx512::kKernels<double>};
  return table;
}
