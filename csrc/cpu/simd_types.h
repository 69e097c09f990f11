// Vector types, and what the compiler's vector extensions do alike on all instruction sets.
#pragma once

#include <stddef.h>

#include <cstdint>
#include <utility>

#include "../common/inline.h"

namespace FASTVAE_ISA {

constexpr int kBytes = FASTVAE_BYTES;  // the width of a vector

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;

// The number of lanes.
template <class T>
constexpr int kWidth = kBytes / int(sizeof(T));

// The integers that hold the bits of a floating-point number.
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

// The first n lanes of v, and zeros in the others.
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

}  // namespace FASTVAE_ISA
