// Sums of many terms, for the CPU and CUDA alike.
#pragma once

#include "inline.h"

namespace fastvae {

// The sum of what was added is sum + lost, as exact as with twice the digits, of numbers or of vectors of them.
//
// D equal terms, added up plainly, are not off by sqrt(D) roundings but by D / 4: as long as the sum stays between two
// powers of 2, every addition rounds by the same amount in the same direction.  Here each addition's rounding error is
// found (Knuth's two-sum) and added up beside the sum.
template <class V>
struct CompensatedSum {
  V sum = {}, lost = {};

  FASTVAE_INLINE void add(V x) {
    const V before = sum;
    sum = before + x;
    const V added = sum - before;
    lost += (before - (sum - added)) + (x - added);
  }
};

// Its sum + lost in double precision, of one number; an infinite sum has lost NaN.
FASTVAE_INLINE double total_of(double sum, double lost) { return lost == lost ? sum + lost : sum; }

}  // namespace fastvae
