// What the instruction sets without masked loads and stores share of what simd.h lists.
#pragma once

#include "simd_types.h"

namespace FASTVAE_ISA {

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

// All bits of a lane that passes, none of one that does not.
template <class T>
using Mask = Vec<Bits<T>>;
template <class T>
constexpr Mask<T> kEveryLane = ~Mask<T>{};
template <class T>
inline Mask<T> below(Vec<T> v, T limit, Mask<T> among) {
  return (v < broadcast<T>(limit)) & among;
}

}  // namespace FASTVAE_ISA
