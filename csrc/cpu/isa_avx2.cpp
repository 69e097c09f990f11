// The kernels with AVX2.
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define FASTVAE_ISA fastvae_avx2
#define FASTVAE_BYTES 32
#include "gaussian.h"  // first, since it is faster as the compiler schedules it
#if !defined(__clang__)
// Without this scheduling, operations of one kind stay in pairs, which Zen 3 spreads over its pipes best.
#pragma GCC optimize("no-schedule-insns2")
#endif
#include "isa_table.h"

const fastvae::Isa& fastvae::isa_avx2() {
  static constexpr Isa table = {"avx2", fastvae_avx2::kKernels<float>, fastvae_avx2::kKernels<double>};
  return table;
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
