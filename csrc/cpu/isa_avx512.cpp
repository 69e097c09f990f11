// The kernels with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define FASTVAE_ISA fastvae_avx512
#define FASTVAE_BYTES 64
#include "isa_table.h"

const fastvae::Isa& fastvae::isa_avx512() {
  static constexpr Isa table = {"avx512", fastvae_avx512::kKernels<float>, fastvae_avx512::kKernels<double>};
  return table;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
