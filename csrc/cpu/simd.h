// Vectors of one instruction set.
//
// This file and those that include it are compiled once for each instruction set, in a namespace of its own
// (isa_*.cpp).  They must not instantiate anything of the standard library: the linker would keep one copy of it,
// possibly the one that needs AVX-512, for all.  Types, such as index sequences, are no code.
//
// The macro FASTVAE_BYTES, the width of a vector, chooses the instruction set.  The file of each set defines:
//
//   kRegisters                 how many vector registers there are
//   kTableSteps                log2 of the largest table that look_up takes; 0: there is no look_up
//   stream(p, v)               stores past the caches where the machine can, so that what is overwritten is not read
//                              first; p is a multiple of kBytes, and other threads may read after drain()
//   load_up_to(p, n)           the first n lanes, at most all, and zeros in the others
//   store_up_to(p, v, n)       the first n lanes, at most all
//   Mask<T>, kEveryLane<T>     which lanes pass a test; all do
//   below(v, limit, among)     those lanes of the mask `among` whose value is below the limit; a NaN never is
//   every_lane<T>(mask)        whether all pass
//   square_root(v)
//   larger(a, b), smaller      of each lane; b where either is NaN
//   multiply_low(a, b)         products of the low 32 bits of each 64-bit lane, whatever the high ones hold
//   look_up(table, i)          table[i % size] for each lane i, from a table that fills a register, or two
#pragma once

#include "simd_types.h"

#if FASTVAE_BYTES == 64
#include "simd_avx512.h"
#elif FASTVAE_BYTES == 32
#include "simd_avx2.h"
#else
#include "simd_baseline.h"
#endif

namespace FASTVAE_ISA {

// In blocks of S lanes: the even blocks of a and b in turn, or the odd blocks.
template <class T, int S, size_t... I>
inline Vec<T> even_blocks(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I - S : I)...);
}
template <class T, int S, size_t... I>
inline Vec<T> odd_blocks(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I : I + S)...);
}

// The even blocks of a and the odd blocks of b, each where it was.
template <class T, int S, size_t... I>
inline Vec<T> blocks_in_turn(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? kWidth<T> + I : I)...);
}
// Each even block of v and the odd one after it change places.
template <class T, int S, size_t... I>
inline Vec<T> swap_blocks(Vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, int(I ^ S)...);
}

// Lane i becomes the sum of the lanes of v[i]; v is used up.
template <class T, int S = 1>
FASTVAE_INLINE Vec<T> sums(Vec<T>* v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
#pragma GCC unroll 8
  for (int i = 0; i < kWidth<T> / 2 / S; ++i) {
    const Vec<T> a = v[2 * i], b = v[2 * i + 1];  // blocks_in_turn is cheaper than moving lanes, which is done once
    v[i] = blocks_in_turn<T, S>(a, b, lanes) + swap_blocks<T, S>(blocks_in_turn<T, S>(b, a, lanes), lanes);
  }
  if constexpr (2 * S < kWidth<T>) return sums<T, 2 * S>(v);
  return v[0];
}

// The sum of the lanes.
template <class T, int S = kWidth<T> / 2>
inline T sum(Vec<T> v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
  if constexpr (S == 0)
    return v[0];
  else
    return sum<T, S / 2>(v + odd_blocks<T, S>(v, v, lanes));
}

// The largest lane.
template <class T, int S = kWidth<T> / 2>
inline T max(Vec<T> v) {
  constexpr auto lanes = std::make_index_sequence<kWidth<T>>();
  if constexpr (S == 0)
    return v[0];
  else {
    const Vec<T> other = odd_blocks<T, S>(v, v, lanes);
    return max<T, S / 2>(v > other ? v : other);
  }
}

// The square v[row][lane], transposed in place.
template <class T, int S = 1>
FASTVAE_INLINE void transpose(Vec<T> (&v)[kWidth<T>]) {
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
